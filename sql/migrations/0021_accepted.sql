-- oldest code: 21
-- A batch all of which Mitto accepted (13) speaks for its messages until their receipts come: a message is written once
-- by its chunk and once by its receipt. What Mitto called them stands with the attempt, a line each, in their order.

alter table attempt add column provider_ids text;
alter table attempt alter column provider_ids set storage external;   -- ids do not shrink, and trying takes longer
alter table message set (fillfactor = 60);     -- one new version of a row where there were two, and mostly not of all at once
comment on column message.settled_at is 'null also where an accepted batch spoke for it: then it is the batch''s done_at';

-- The state that is shown: a message's own if it has one, else its batch's. What an accepted batch says of a message, its
-- own state says.
create or replace view message_shown as
select m.campaign_id, m.id, m.phone, m.text, m.segments, m.reason, m.detail,
       coalesce(m.provider_id, case when b.state = 13 then (
         select split_part(a.provider_ids, E'\n', (m.id - a.first_id + 1)::int) from attempt a
          where a.batch_id = b.id and a.n = b.attempt) end) as provider_id,
       m.created_at,
       coalesce(m.settled_at, case when b.state = 13 or m.state between 10 and 30 then b.done_at end) as settled_at,
       m.finished_at, b.id as batch_id, b.tenant_id, b.bulk_id, b.reference,
       b.done_at as batch_done_at,
       case
         when m.state is null then
           case when b.state in (0, 1) then 'queued' when b.state in (2, 3) then 'processing'
                when b.state = 11 then 'unknown' when b.state = 12 then 'cancelled'
                when b.state = 13 then 'accepted' end
         when m.state = 5 then 'unknown'
         when m.state in (10, 11) then 'accepted'
         when m.state = 20 then 'failed'
         when m.state = 30 then 'delivered'
         when m.state = 40 then 'failed'
         when m.state = 50 then 'skipped'
       end as status,
       coalesce(m.state, case when b.state = 13 then 10::smallint end) as own_state, b.state as batch_state
  from message m
  left join lateral (
    select * from batch where batch.first_id <= m.id order by batch.first_id desc limit 1
  ) b on b.last_id >= m.id and b.campaign_id = m.campaign_id;

-- What Mitto called each message that it accepted under an id: said by the message, or by the attempt of its batch.
create view message_given as
select campaign_id, id, provider_id from message where provider_id is not null
union all
select m.campaign_id, m.id, u.provider_id
  from batch b
  join attempt a on a.batch_id = b.id and a.n = b.attempt
  cross join lateral unnest(string_to_array(a.provider_ids, E'\n')) with ordinality as u(provider_id, place)
  join message m on m.campaign_id = b.campaign_id and m.id = a.first_id + u.place - 1 and m.provider_id is null
 where b.state = 13;

-- The next messages of a campaign between two ids that Mitto accepted under an id and whose final receipt did not come.
create function pending_messages(p_campaign bigint, p_after bigint, p_until bigint, p_most bigint)
returns table (id bigint, provider_id text) language sql stable as $$
  select * from (
    (select m.id, m.provider_id from message m
      where m.campaign_id = p_campaign and m.id > p_after and m.id <= p_until and m.state in (10, 11)
        and m.provider_id is not null
      order by m.id limit p_most)
    union all
    (select m.id, split_part(a.provider_ids, E'\n', (m.id - a.first_id + 1)::int)
       from batch b
       join attempt a on a.batch_id = b.id and a.n = b.attempt
      cross join lateral (
        select x.id from message x
         where x.campaign_id = p_campaign and x.id between greatest(b.first_id, p_after + 1) and least(b.last_id, p_until)
           and x.state is null
         order by x.id limit p_most) m
      where b.campaign_id = p_campaign and b.last_id > p_after and b.first_id <= p_until and b.state = 13
      order by b.first_id, m.id limit p_most)) each
   order by id limit p_most
$$;

-- What an accepted batch speaks for, its messages say themselves from now on.
create function expose_accepted(p_batch bigint) returns void language plpgsql
set plan_cache_mode = force_generic_plan
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off as $$
declare b batch;
begin
  select * into b from batch where id = p_batch and state = 13;
  if not found then return; end if;
  perform from message m
   where m.campaign_id = b.campaign_id and m.id between b.first_id and b.last_id and m.state is null
   order by m.id for no key update;
  update batch set state = 10 where id = b.id and state = 13;
  if not found then return; end if;                      -- somebody else did
  update message m set state = 10, provider_id = u.provider_id, settled_at = b.done_at
    from attempt a
    cross join lateral unnest(string_to_array(a.provider_ids, E'\n')) with ordinality as u(provider_id, place)
   where a.batch_id = b.id and a.n = b.attempt
     and m.campaign_id = b.campaign_id and m.id = a.first_id + u.place - 1 and m.state is null;
end $$;

-- Mitto accepted all of a batch: p_n messages from p_first on, with these ids in their order, a line each. The batch says
-- so, and no message is written. Where anything is out of the ordinary, settle_items writes it message by message, and
-- what is returned is as there.
create function settle_accepted(p_batch bigint, p_attempt int, p_first bigint, p_n int, p_provider_ids text,
                                p_bulk_id text, p_status int)
returns boolean language plpgsql set plan_cache_mode = force_generic_plan set enable_seqscan = off as $$
declare b batch; ids text[] := string_to_array(p_provider_ids, E'\n', ''); now_ timestamptz := clock_timestamp();
begin
  select * into b from batch where id = p_batch;
  if (b.state, b.attempt, b.first_id, b.last_id, b.n, b.unsure, cardinality(ids)) = (3, p_attempt, p_first, p_first + p_n - 1, p_n, 0, p_n)
     and array_position(ids, null) is null then
    begin  -- nearly always all ids are new; in their order, so that neighbours share a page, and two wait in one order
      insert into provider_message (provider_id, campaign_id, message_id, account_id)
      select u.provider_id, b.campaign_id, p_first + u.place - 1, b.account_id
        from unnest(ids) with ordinality as u(provider_id, place) order by u.provider_id;
    exception when unique_violation then b.state := null;
    end;
    if b.state = 3 then
      update batch set state = 13, n = 0, segments = 0, owner = null, bulk_id = p_bulk_id, done_at = now_
       where id = b.id and (state, attempt, first_id, last_id) = (3, p_attempt, b.first_id, b.last_id);
      if not found then raise exception 'batch % moved while its answer was written', p_batch
        using errcode = 'serialization_failure'; end if;
      update attempt set outcome = 'accepted', status = p_status, ended_at = now_, provider_ids = p_provider_ids
       where batch_id = b.id and n = p_attempt;
      perform count_messages(b.campaign_id, b.n, 0, 0, 0, 0, 0, b.segments);
      perform move_credits(b.tenant_id, 'spend', b.segments, b.campaign_id, b.id, 'accepted');
      return true;
    end if;
  end if;
  return settle_items(p_batch, p_attempt, array(select generate_series(p_first, p_first + p_n - 1)),
                      array_fill(10::smallint, array[p_n]), ids, array_fill(null::text, array[1]), p_bulk_id, p_status);
end $$;

-- The largest state seen wins, so order and repeats do not matter. p_accounts names the account where the webhook's
-- secret told it: an id of another account is then not touched. Ids that are not ours yet are kept, each with the states
-- that say more than what is kept of it already. The order is one for all, so that two wait and do not deadlock; of
-- several for one message the update takes the first. Nested loops pinned as in 0007. Who is known at Mitto without a state
-- of its own was accepted with its batch.
create or replace function apply_receipts(p_accounts bigint[], p_ids text[], p_states smallint[], p_at timestamptz[],
                                          p_descriptions text[], out updated bigint, out kept bigint)
language plpgsql set plan_cache_mode = force_generic_plan
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off as $$
declare nobodys bigint[]; back bigint;
begin
  kept := 0;
  with found as materialized (
    select k.campaign_id, k.message_id, k.provider_id, u.state, u.at, u.description, u.place
      from unnest(p_accounts, p_ids, p_states, p_at, p_descriptions) with ordinality
             as u(account_id, provider_id, state, at, description, place)
      left join provider_message k
        on k.provider_id = u.provider_id and k.account_id = coalesce(u.account_id, k.account_id)
     order by k.campaign_id, k.message_id, u.state desc, u.at),
  moved as (
    update message m
       set state = f.state, provider_id = f.provider_id,
           finished_at = case when f.state >= 20 then coalesce(f.at, clock_timestamp()) end,
           reason = case when f.state = 20 then 'delivery_failed' end,
           detail = case when f.state = 20 then f.description end
      from found f
     where m.campaign_id = f.campaign_id and m.id = f.message_id
       and (m.state is null or m.state in (10, 11)) and f.state > coalesce(m.state, 10)
    returning m.campaign_id, m.state),
  counted as (
    insert into campaign_counter as c (campaign_id, shard, pending, delivered, delivery_failed)
    select campaign_id, pg_backend_pid() % 8, -count(*),
           count(*) filter (where state = 30), count(*) filter (where state = 20)
      from moved where campaign_id <> 0 and state >= 20 group by campaign_id order by campaign_id
    on conflict (campaign_id, shard) do update
       set pending = c.pending + excluded.pending, delivered = c.delivered + excluded.delivered,
           delivery_failed = c.delivery_failed + excluded.delivery_failed)
  select (select count(*) from moved), (select array_agg(place) from found where message_id is null)
    into updated, nobodys;
  if nobodys is not null then
    with u as (
      select p_accounts[place] as account_id, p_ids[place] as provider_id, p_states[place] as state, p_at[place] as at,
             p_descriptions[place] as description from unnest(nobodys) as place),
    furthest as (
      select distinct on (provider_id, account_id) * from (
        select u.*, true as is_new from u
        union all
        select e.account_id, e.provider_id, e.state, null, null, false from early_receipt e
         where e.provider_id = any (array(select provider_id from u))) x
       order by provider_id, account_id, state desc, is_new, at), -- what is kept already stays if it says as much
    early as (
      insert into early_receipt (provider_id, account_id, state, at, description)
      select provider_id, account_id, state, at, description from furthest where is_new
      returning 1)
    select count(*) into kept from early;
  end if;
  -- Whatever else did not move may have failed before, also just now, by somebody whom the update waited for.
  if 30 = any (p_states) and updated + coalesce(cardinality(nobodys), 0) < cardinality(p_ids) then
    with found as materialized (
      select k.campaign_id, k.message_id, u.at
        from unnest(p_accounts, p_ids, p_states, p_at) as u(account_id, provider_id, state, at)
        join provider_message k
          on k.provider_id = u.provider_id and k.account_id = coalesce(u.account_id, k.account_id)
       where u.state = 30 order by k.campaign_id, k.message_id, u.at),
    moved as (
      update message m set state = 30, finished_at = coalesce(f.at, clock_timestamp()), reason = null, detail = null
        from found f where m.campaign_id = f.campaign_id and m.id = f.message_id and m.state = 20
      returning m.campaign_id),
    counted as (
      insert into campaign_counter as c (campaign_id, shard, delivered, delivery_failed)
      select campaign_id, pg_backend_pid() % 8, count(*), -count(*)
        from moved where campaign_id <> 0 group by campaign_id order by campaign_id
      on conflict (campaign_id, shard) do update
         set delivered = c.delivered + excluded.delivered, delivery_failed = c.delivery_failed + excluded.delivery_failed)
    select count(*) into back from moved;
    updated := updated + back;
  end if;
end $$;

-- A replica says that it had posted these messages as this attempt. What the database forgot of it is brought back: the
-- messages, their batch and its range, the attempt, the hold. It is being posted then, until its result is written like
-- any other. Returns
--   known      nothing was forgotten, or a newer attempt is there
--   restored
--   lost       the campaign itself, or its lane, is not there any more
--   conflict   something else stands in its place; nothing was changed
create or replace function reassert(p_batch bigint, p_epoch int, p_attempt int, p_campaign bigint, p_tenant bigint,
                         p_account bigint, p_replica bigint, p_slot bigint, p_sender text, p_ids bigint[],
                         p_phones bigint[], p_texts text[], p_segments int[])
returns text language plpgsql as $$
declare
  b batch; lane_ bigint; first_ bigint := p_ids[1]; last_ bigint := p_ids[cardinality(p_ids)]; cleared boolean;
  held bigint; added bigint; need bigint; part bigint; reopened bigint; unsure_ bigint; gone bigint; forgone bigint;
begin
  if p_campaign <> 0 then
    perform from campaign where id = p_campaign for no key update;
    perform from expansion where campaign_id = p_campaign for no key update;
  end if;
  select id into lane_ from lane
   where account_id = p_account and tenant_id = p_tenant and campaign_id = p_campaign
     and class = case when p_campaign = 0 then 0 else 1 end;
  if not found then return 'lost'; end if;
  select * into b from batch where id = p_batch for no key update;
  if b.attempt >= p_attempt then return 'known'; end if;
  perform expose_accepted(o.id) from (
    select id from batch
     where campaign_id = p_campaign and state = 13 and first_id <= last_ and last_id >= first_ order by id) o;
  if b.campaign_id <> p_campaign or first_ > b.last_id or last_ < b.first_id
     or exists (select from unnest(p_ids, p_phones) as u(id, phone) join message m
                    on m.campaign_id = p_campaign and m.phone = u.phone and m.id <> u.id where p_campaign <> 0)
     or exists (select from message m
                 where m.campaign_id = p_campaign and m.id = any (p_ids) and m.state not in (5, 40)) then
    return 'conflict';
  end if;
  begin
    select x.cleared, x.held into cleared, held from clear_range(p_batch, p_campaign, first_, last_) x;
    if not cleared then raise exception using errcode = 'RE001'; end if;
    with added_ as (
      insert into message (campaign_id, id, phone, text, segments)
      select p_campaign, u.id, u.phone, u.text, u.segments
        from unnest(p_ids, p_phones, p_texts, p_segments) as u(id, phone, text, segments)
      on conflict do nothing returning segments)
    select coalesce(sum(segments), 0) into added from added_;
    with was as (
      select id, state, segments from message
       where campaign_id = p_campaign and id = any (p_ids) and state in (5, 40) for no key update),
    open_ as (
      update message m set state = null, reason = null, detail = null, settled_at = null, finished_at = null
        from was where m.campaign_id = p_campaign and m.id = was.id)
    select count(*) filter (where state = 40), count(*) filter (where state = 5),
           held + coalesce(sum(segments) filter (where state = 5), 0)
      into reopened, unsure_, held from was;
    perform count_messages(p_campaign, 0, 0, 0, -reopened, -unsure_, 0, 0);
    -- Between those that were posted: dropped by the intent that was forgotten, as long as nobody else can have had them.
    with between_ as (
      update message m
         set state = case when x.dropped then 50 else 5 end,
             reason = case when x.dropped then 'opted_out' else 'no_answer' end,
             settled_at = case when not x.dropped then clock_timestamp() end,
             finished_at = case when x.dropped then clock_timestamp() end
        from (select y.id, p_attempt = 1 or exists (select from opt_out o where o.tenant_id = p_tenant and o.phone = y.phone)
                     as dropped
                from message y
               where y.campaign_id = p_campaign and y.id between first_ and last_ and y.state is null
                 and y.id <> all (p_ids)) x
       where m.campaign_id = p_campaign and m.id = x.id returning m.state, m.segments)
    select count(*) filter (where state = 50), count(*) filter (where state = 5),
           coalesce(sum(segments) filter (where state = 5), 0) into gone, unsure_, forgone from between_;
    perform count_messages(p_campaign, 0, 0, 0, 0, unsure_, gone, 0);
    need := forgone + (select segments from open_messages(p_campaign, first_, last_)) - held;
    -- The audience that will be read again was held for them.
    update expansion e set held = e.held - least(e.held, added, greatest(need, 0)) from expansion old
     where e.campaign_id = p_campaign and p_campaign <> 0 and old.campaign_id = e.campaign_id
    returning old.held - e.held into part;
    need := need - coalesce(part, 0);
    if need < 0 then
      perform move_credits(p_tenant, 'release', -need, p_campaign, p_batch, 'reasserted');
    elsif not move_credits(p_tenant, 'hold', need, p_campaign, p_batch, 'reasserted') then
      raise exception using errcode = 'RE002';
    end if;
    if b.id is null then
      insert into batch (id, campaign_id, lane_id, tenant_id, account_id, first_id, last_id, n, segments, sender)
      overriding system value
      values (p_batch, p_campaign, lane_, p_tenant, p_account, first_, last_, 0, 0, p_sender);
    end if;
    update batch
       set state = 3, epoch = p_epoch, attempt = p_attempt, owner = p_replica, slot = p_slot, not_before = null,
           done_at = null, unsure = batch.unsure + unsure_,
           (n, segments) = (select * from open_messages(p_campaign, first_, last_))
     where id = p_batch;
    insert into attempt (batch_id, n, campaign_id, first_id, last_id, replica_id, slot_at, intent_at)
    values (p_batch, p_attempt, p_campaign, first_, last_, p_replica, from_us(p_slot), from_us(p_slot))
    on conflict do nothing;
    perform setval('message_id', last_) from message_id where last_value < last_;
    perform setval('batch_id_seq', p_batch) from batch_id_seq where last_value < p_batch;
    perform reopen_campaign(p_campaign);
  exception
    when sqlstate 'RE001' then return 'conflict';
    when sqlstate 'RE002' then return 'unpaid';
  end;
  return 'restored';
end $$;

-- Nothing changes the next p_most messages any more: receipts do not find them, and results, evidence and verdicts on
-- unknown ones come too late. They stay unknown, with their hold, until they go. False: no more to do, or not now.
create or replace function close_piece(p_campaign bigint, p_most int) returns boolean language plpgsql
set plan_cache_mode = force_generic_plan
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off as $$
declare after_ bigint; until_ bigint;
begin
  if not may_remove() then return false; end if;
  select a.cursor into after_ from campaign_archive a where a.campaign_id = p_campaign and a.stage = 'closing';
  if not found then return false; end if;
  until_ := piece_end(p_campaign, after_, p_most);
  if until_ is null then
    delete from lane where campaign_id = p_campaign;     -- no posting can be asserted for it any more
    update campaign_archive set stage = 'closed', cursor = 0 where campaign_id = p_campaign and stage = 'closing';
    return false;
  end if;
  perform expose_unknown(b.id) from (
    select id from batch where campaign_id = p_campaign and first_id > after_ and first_id <= until_ and state = 11
     order by id) b;
  perform expose_accepted(b.id) from (
    select id from batch where campaign_id = p_campaign and first_id > after_ and first_id <= until_ and state = 13
     order by id) b;
  update batch set unsure = 0
   where campaign_id = p_campaign and first_id > after_ and first_id <= until_ and unsure > 0;
  update attempt set outcome = 'expired', ended_at = coalesce(ended_at, clock_timestamp())
   where campaign_id = p_campaign and first_id > after_ and first_id <= until_
     and outcome is distinct from 'duplicate' and outcome is distinct from 'expired';
  -- By arrays: of a join the planner may read the wrong side whole.
  delete from unmapped_id where batch_id = any (array(
    select id from batch where campaign_id = p_campaign and first_id > after_ and first_id <= until_));
  delete from provider_message where provider_id = any (array(
    select provider_id from message
     where campaign_id = p_campaign and id > after_ and id <= until_ and provider_id is not null));
  update campaign_archive set cursor = until_ where campaign_id = p_campaign;
  return true;
end $$;

-- The next p_most single messages after id p_after that are older than that and not on their way: gone with all that
-- names them. What is held for unknown ones comes back. until_id null: there are none, or not now.
create or replace function remove_singles(p_seconds float8, p_after bigint, p_most int, out until_id bigint, out removed bigint)
language plpgsql set plan_cache_mode = force_generic_plan
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off as $$
declare before_ timestamptz := clock_timestamp() - make_interval(secs => p_seconds); gone bigint[]; ids bigint[]; k record;
begin
  removed := 0;
  if not may_remove() then return; end if;
  select max(x.first_id) into until_id
    from (select first_id, created_at from batch
           where campaign_id = 0 and first_id > p_after order by first_id limit p_most) x
   where x.created_at < before_;
  if until_id is null then return; end if;
  gone := array(
    select b.id from batch b
     where b.campaign_id = 0 and b.first_id > p_after and b.first_id <= until_id and b.state in (10, 11, 12, 13)
       and greatest(b.created_at, b.done_at) < before_
       and not exists (select from attempt t where t.batch_id = b.id and t.ended_at >= before_)
     order by b.id for no key update skip locked);
  perform expose_accepted(u.id) from unnest(gone) as u(id);
  for k in
    select b.tenant_id, min(b.id) as batch_id, count(*) as n, count(*) filter (where b.state = 12) as cancelled,
           count(*) filter (where m.state in (10, 11)) as pending, count(*) filter (where m.state = 30) as delivered,
           count(*) filter (where m.state = 20) as delivery_failed, count(*) filter (where m.state = 40) as refused,
           count(*) filter (where m.state = 5 or (m.state is null and b.state = 11)) as unknown,
           coalesce(sum(m.segments) filter (where m.state in (10, 11, 20, 30)), 0) as spent,
           coalesce(sum(m.segments) filter (where m.state = 5 or (m.state is null and b.state = 11)), 0) as worth
      from batch b
      cross join lateral (select state, segments from message
                           where campaign_id = 0 and id = b.first_id for no key update) m
     where b.id = any (gone) group by b.tenant_id order by b.tenant_id
  loop
    insert into campaign_archive as a (campaign_id, tenant_id, stage, batches, cancelled, pending, delivered,
                                       delivery_failed, refused, unknown, spent)
    values (0, k.tenant_id, 'done', k.n, k.cancelled, k.pending, k.delivered, k.delivery_failed, k.refused,
            k.unknown, k.spent)
    on conflict (campaign_id, tenant_id) do update
       set batches = a.batches + excluded.batches, cancelled = a.cancelled + excluded.cancelled,
           pending = a.pending + excluded.pending, delivered = a.delivered + excluded.delivered,
           delivery_failed = a.delivery_failed + excluded.delivery_failed, refused = a.refused + excluded.refused,
           unknown = a.unknown + excluded.unknown, spent = a.spent + excluded.spent;
    perform move_credits(k.tenant_id, 'release', k.worth, 0, k.batch_id, 'expired');
    removed := removed + k.n;
  end loop;
  delete from unmapped_id where batch_id = any (gone);
  ids := array(select first_id from batch where id = any (gone));
  delete from provider_message where provider_id = any (array(
    select provider_id from message where campaign_id = 0 and id = any (ids) and provider_id is not null));
  delete from message where campaign_id = 0 and id = any (ids);
  -- Holds of single messages name no batch: they go by their age, and sums stay what they are.
  perform fold_ledger(array(
    select id from ledger where campaign_id is null and kind <> 'grant' and reason is distinct from 'retention'
       and batch_id = any (gone)));
  perform fold_ledger(array(
    select id from ledger where campaign_id is null and kind <> 'grant' and reason is distinct from 'retention'
       and batch_id is null and at < before_ order by at limit 2 * p_most));
  delete from attempt where batch_id = any (gone);
  delete from batch where id = any (gone);
end $$;
