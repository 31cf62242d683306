-- oldest code: 3
-- Receipts that nobody waits for, and a ledger that only grows.

-- ------------------------------------------------------------------------------------------- receipts

create index early_receipt_by_age on early_receipt (received_at);
create index raw_receipt_once on raw_receipt (md5(body));

-- The largest state seen wins, so order and repeats do not matter. p_accounts names the account where the webhook's
-- secret told it: an id of another account is then not touched. Ids that are not ours yet are kept, each with the
-- states that say more than what is kept of it already.
-- Nested loops pinned: on tables that were never analysed the planner reads them whole (20,000 receipts/s at best).
create or replace function apply_receipts(p_accounts bigint[], p_ids text[], p_states smallint[], p_at timestamptz[],
                                          p_descriptions text[], out updated bigint, out kept bigint)
language plpgsql set plan_cache_mode = force_generic_plan
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off as $$
begin
  with r as (
    select distinct on (u.provider_id, u.account_id) u.*
      from unnest(p_accounts, p_ids, p_states, p_at, p_descriptions)
           as u(account_id, provider_id, state, at, description)
     order by u.provider_id, u.account_id, u.state desc, u.at),
  matched as (
    select r.*, k.campaign_id, k.message_id from r
      left join provider_message k
        on k.provider_id = r.provider_id and k.account_id = coalesce(r.account_id, k.account_id)),
  best as (
    select distinct on (campaign_id, message_id) * from matched where message_id is not null
     order by campaign_id, message_id, state desc, at),
  old as (
    select m.campaign_id, m.id, m.state as was, best.state, best.at, best.description
      from best join message m on m.campaign_id = best.campaign_id and m.id = best.message_id
     where m.state in (10, 11, 20) and best.state > m.state
     order by m.campaign_id, m.id for no key update of m),
  moved as (
    update message m
       set state = old.state,
           finished_at = case when old.state >= 20 then coalesce(old.at, clock_timestamp()) end,
           reason = case when old.state = 20 then 'delivery_failed' end,
           detail = case when old.state = 20 then old.description end
      from old where m.campaign_id = old.campaign_id and m.id = old.id
    returning m.campaign_id, old.was, m.state),
  delta as (
    select campaign_id,
           sum((state in (10, 11))::int - (was in (10, 11))::int) as pending,
           sum((state = 30)::int) as delivered,
           sum((state = 20)::int - (was = 20)::int) as delivery_failed
      from moved where campaign_id <> 0 group by campaign_id),
  counted as (
    insert into campaign_counter as c (campaign_id, shard, pending, delivered, delivery_failed)
    select campaign_id, pg_backend_pid() % 8, pending, delivered, delivery_failed
      from delta where (pending, delivered, delivery_failed) <> (0, 0, 0) order by campaign_id
    on conflict (campaign_id, shard) do update
       set pending = c.pending + excluded.pending, delivered = c.delivered + excluded.delivered,
           delivery_failed = c.delivery_failed + excluded.delivery_failed),
  early as (
    insert into early_receipt (provider_id, account_id, state, at, description)
    select r.provider_id, r.account_id, r.state, r.at, r.description from matched r
     where r.message_id is null
       and not exists (select from early_receipt e
                        where e.provider_id = r.provider_id and e.account_id is not distinct from r.account_id
                          and e.state >= r.state)
    returning 1)
  select (select count(*) from moved), (select count(*) from early) into updated, kept;
end $$;

-- Early receipts whose message is known by now. p_ids null: of those that came in the last minute; see
-- sweep_early_receipts for the others. Meant for a new snapshot, after the commit of the settle or the receipt that
-- may have missed the other. Locked in one order, so that those who look at once wait and do not deadlock.
create or replace function rejoin_receipts(p_ids text[]) returns bigint
language plpgsql set plan_cache_mode = force_generic_plan
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off as $$
declare found_ bigint[]; accounts bigint[]; ids text[]; states smallint[]; ats timestamptz[]; descriptions text[];
begin
  if p_ids is null then
    select array_agg(id) into found_
      from (select e.id from early_receipt e
              join provider_message k
                on k.provider_id = e.provider_id and k.account_id = coalesce(e.account_id, k.account_id)
             where e.received_at > clock_timestamp() - interval '1 minute' order by e.id for update of e) f;
  else
    select array_agg(id) into found_
      from (select e.id from early_receipt e
              join provider_message k
                on k.provider_id = e.provider_id and k.account_id = coalesce(e.account_id, k.account_id)
             where e.provider_id = any (p_ids) order by e.id for update of e) f;
  end if;
  if found_ is null then return 0; end if;
  with e as (delete from early_receipt where id = any (found_) returning *)
  select array_agg(account_id), array_agg(provider_id), array_agg(state), array_agg(at), array_agg(description)
    into accounts, ids, states, ats, descriptions from e;
  return (select updated from apply_receipts(accounts, ids, states, ats, descriptions));
end $$;

-- The next p_most early receipts after id p_after: what is known by now is applied, and whose id nobody has known for
-- a day goes to the raw inbox in Mitto's spelling, where `smsd receipts replay` finds it. last_id null: there are none.
create function sweep_early_receipts(p_after bigint, p_most int, out last_id bigint, out joined bigint,
                                     out given_up bigint) language plpgsql as $$
declare ids text[];
begin
  select max(e.id), array_agg(e.provider_id) into last_id, ids
    from (select id, provider_id from early_receipt where id > p_after order by id limit p_most) e;
  if last_id is null then joined := 0; given_up := 0; return; end if;
  joined := rejoin_receipts(ids);
  with old as (
    select id from early_receipt
     where id > p_after and id <= last_id and received_at < clock_timestamp() - interval '1 day'
       and cardinality(candidates) = 0                        -- else a person is to choose
       and (not isfinite(next_ask_at) or received_at < clock_timestamp() - interval '7 days')   -- Mitto is being asked
     order by id for update skip locked),
  gone as (
    delete from early_receipt e using old where e.id = old.id returning e.*),
  raw as (
    insert into raw_receipt (account_id, body, why, received_at)
    select account_id,
           json_build_object('messageId', provider_id,
                             'deliveryStatus', case state when 30 then 'Delivered' when 20 then 'Failure' else 'Sent' end,
                             'updatedAt', at, 'description', description)::text,
           'no message has this id', received_at
      from gone order by id
    returning 1)
  select count(*) into given_up from raw;
end $$;

-- ------------------------------------------------------------------------------------------- ids

-- Message ids are handed out in blocks without gaps, so that a batch is a range. The lock is held for this call
-- only: it goes with the inner block, whose end is an error on purpose; whatever else ends it (a cancel, a
-- time-out) takes the lock along too. Sequences do not roll back, so an id is never handed out again.
create or replace function take_message_ids(p_n int) returns bigint language plpgsql as $$
declare first_ bigint;
begin
  perform look_at_instance();                           -- before an id is handed out that was handed out and forgotten
  begin
    perform pg_advisory_xact_lock(7276301);
    first_ := nextval('message_id');
    if p_n > 1 then perform setval('message_id', first_ + p_n - 1); end if;
    raise exception sqlstate 'SM001';
  exception when sqlstate 'SM001' then null;
  end;
  return first_;
end $$;

-- ------------------------------------------------------------------------------------------- money

-- What every entry must be, whoever writes it. Not validated: what older code wrote is looked at by `smsd audit`.
alter table ledger
  add constraint ledger_grant check (kind <> 'grant' or (reason is not null and campaign_id is null
                                                         and batch_id is null)) not valid,
  add constraint ledger_hold check (kind <> 'hold' or reason is not null) not valid,
  add constraint ledger_spend check (kind <> 'spend' or batch_id is not null or campaign_id is not null
                                     or reason is not distinct from 'overdue') not valid,
  add constraint ledger_release check (kind <> 'release' or campaign_id is not null or batch_id is not null) not valid;

-- What is written stays. Retention, when it comes, says so in its own transaction: set local smsd.retention = 'on'.
create function keep_ledger() returns trigger language plpgsql as $$
begin
  if current_setting('smsd.retention', true) is distinct from 'on' then
    raise exception 'the ledger only grows: % is refused', lower(tg_op)
      using errcode = 'restrict_violation', hint = 'correct an entry by one that says the opposite';
  end if;
  return null;
end $$;
create trigger ledger_only_grows before update or delete or truncate on ledger
  for each statement execute function keep_ledger();

-- Pauses a campaign whose next chunk needs more credits than the p_available that there were. False: there are more
-- by now (a top-up came in between, and looked for paused campaigns before this one was), or it does not send.
create function pause_for_credits(p_campaign bigint, p_available bigint, p_detail text) returns boolean
language plpgsql as $$
declare tenant bigint;
begin
  select tenant_id into tenant from campaign where id = p_campaign for no key update;
  perform from expansion where campaign_id = p_campaign for no key update;
  perform from credit where tenant_id = tenant and granted - spent - reserved <= p_available for no key update;
  if not found then return false; end if;
  return pause_campaign(p_campaign, 'INSUFFICIENT_CREDITS', p_detail);
end $$;
