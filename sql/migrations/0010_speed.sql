-- oldest code: 3
-- What cost more than it had to, as the bench shows it.

-- Half a page stays free: every message is written once more by its result and once more by its receipt, and both find
-- room beside the row, so that no index hears of it.
alter table message set (fillfactor = 50);

-- A function in SQL is planned at every call, one in PL/pgSQL once a connection.
create or replace function rate_keep(r rate) returns void language plpgsql as $$
begin
  update rate set ts = r.ts, cum = r.cum, base = r.base, last = r.last, last_cost = r.last_cost, v = r.v,
                  singles = r.singles
   where scope = r.scope and id = r.id;
end $$;

create or replace function count_messages(p_campaign bigint, p_pending bigint, p_delivered bigint,
                                          p_delivery_failed bigint, p_refused bigint, p_unknown bigint,
                                          p_skipped bigint, p_spent bigint)
returns void language plpgsql as $$
begin
  if p_campaign = 0 then return; end if;
  insert into campaign_counter as c
         (campaign_id, shard, pending, delivered, delivery_failed, refused, unknown, skipped, spent)
  values (p_campaign, pg_backend_pid() % 8, p_pending, p_delivered, p_delivery_failed, p_refused, p_unknown,
          p_skipped, p_spent)
  on conflict (campaign_id, shard) do update
     set pending = c.pending + excluded.pending, delivered = c.delivered + excluded.delivered,
         delivery_failed = c.delivery_failed + excluded.delivery_failed, refused = c.refused + excluded.refused,
         unknown = c.unknown + excluded.unknown, skipped = c.skipped + excluded.skipped,
         spent = c.spent + excluded.spent;
end $$;

-- The table may have been empty when the plan was made.
create or replace function end_attempt(p_batch bigint, p_attempt int, p_outcome text, p_status int, p_detail text,
                                       p_refusal text)
returns void language plpgsql set enable_seqscan = off as $$
begin
  update attempt set outcome = p_outcome, status = p_status, detail = p_detail, refusal = p_refusal,
                     ended_at = clock_timestamp()
   where batch_id = p_batch and n = p_attempt and (outcome is null or outcome = 'unknown');
end $$;

-- By its id alone: with the state in the condition Postgres takes the index of what is in flight, through which every
-- batch has passed.
create or replace function intent(p_batch bigint, p_owner bigint, p_epoch int)
returns table (verdict text, attempt int, sender text, ids bigint[], phones bigint[], texts text[])
language plpgsql set plan_cache_mode = force_generic_plan as $$
#variable_conflict use_column
declare b batch; l lane; dropped int := 0; worth bigint := 0; halted boolean;
begin
  select * into b from batch where id = p_batch for no key update;
  if not found or (b.state, b.owner, b.epoch) is distinct from (2::smallint, p_owner, p_epoch) then verdict := 'lost'; return next; return; end if;
  select * into l from lane where id = b.lane_id;
  if l.closed then
    perform cancel_batch(b.id, '{2}');
    perform give_back(b.account_id, b.tenant_id, b.slot, coalesce(b.cost, b.n));
    verdict := 'cancelled'; return next; return;
  end if;
  select l.paused or x.paused_reason is not null or coalesce(x.blocked_until > clock_timestamp(), false)
         or not instance_is_kept() into halted
    from traffic_account x where x.id = b.account_id;
  if halted then
    perform withdraw(b.id, b.epoch, 'paused');
    verdict := 'paused'; return next; return;
  end if;
  if b.campaign_id <> 0 then
    with gone as (
      update message m set state = 50, reason = 'opted_out', finished_at = clock_timestamp()
       where m.campaign_id = b.campaign_id and m.id between b.first_id and b.last_id and m.state is null
         and exists (select from opt_out o where o.tenant_id = b.tenant_id and o.phone = m.phone)
      returning m.segments)
    select count(*), coalesce(sum(gone.segments), 0) into dropped, worth from gone;
  end if;
  if dropped > 0 then
    perform count_messages(b.campaign_id, 0, 0, 0, 0, 0, dropped, 0);
    perform move_credits(b.tenant_id, 'release', worth, b.campaign_id, b.id, 'opted_out');
  end if;
  if dropped = b.n then
    update batch set state = 10, n = 0, segments = 0, owner = null, done_at = clock_timestamp() where id = b.id;
    perform give_back(b.account_id, b.tenant_id, b.slot, coalesce(b.cost, b.n));
    verdict := 'empty'; return next; return;
  end if;
  update batch set state = 3, attempt = batch.attempt + 1, n = batch.n - dropped, segments = batch.segments - worth
   where id = b.id;
  insert into attempt (batch_id, n, campaign_id, first_id, last_id, replica_id, slot_at, pair)
  values (b.id, b.attempt + 1, b.campaign_id, b.first_id, b.last_id, p_owner, from_us(b.slot), b.pair);
  return query
    select 'post', b.attempt + 1, b.sender, array_agg(m.id), array_agg(m.phone), array_agg(m.text)
      from (select id, phone, text from message m
             where m.campaign_id = b.campaign_id and m.id between b.first_id and b.last_id and m.state is null
             order by id) m;
end $$;
