-- oldest code: 3
-- What may have been accepted, and how it is resolved: by evidence, or by a person's verdict.

-- What `smsd probe`, or experience, found out about this account: referenceKept, orderKept, largestRequest, …
alter table traffic_account add column capabilities jsonb not null default '{}';

-- unsure: how many of its messages Mitto may have under an id that we do not know, beside those that it still speaks
-- for: unknown ones, those with a verdict, those sent again because somebody asked. told_at: a person was told.
alter table batch add column on_unknown text not null default 'hold' check (on_unknown in ('hold', 'resend')),
                  add column unsure int not null default 0 check (unsure >= 0),
                  add column told_at timestamptz;
create index batch_unresolved on batch (account_id, campaign_id) where state = 11 or unsure > 0;
update batch b set unsure = u.n
  from (select campaign_id from campaign_counter group by 1 having sum(unknown) > 0 union all select 0) c
  join lateral (select x.id, count(*) as n
                  from batch x join message m on m.campaign_id = x.campaign_id and m.id between x.first_id and x.last_id
                 where x.campaign_id = c.campaign_id and m.state = 5 group by x.id) u on true
 where b.id = u.id;

-- When messages of this attempt were sent again because a person or the caller asked.
alter table attempt add column resent_at timestamptz;

-- What was asked about a receipt whose id nobody knows, and what came of it.
alter table early_receipt add column asked int not null default 0,
                          add column next_ask_at timestamptz not null default '-infinity',
                          add column verdict text,
                          add column candidates bigint[] not null default '{}';
create index early_receipt_to_ask on early_receipt (next_ask_at, id) where next_ask_at < 'infinity';

-- Ids from answers whose order is not that of the request: which message each belongs to is asked one by one.
create table unmapped_id (
  provider_id  text collate "C" not null primary key,
  account_id   bigint not null,
  batch_id     bigint not null,
  attempt      int not null,
  asked        int not null default 0,
  next_ask_at  timestamptz not null default clock_timestamp(),
  verdict      text,
  created_at   timestamptz not null default clock_timestamp()
);
create index unmapped_id_to_ask on unmapped_id (next_ask_at) where next_ask_at < 'infinity';

-- ------------------------------------------------------------------------------------------- batch to messages

-- What an unknown batch speaks for, its messages say themselves from now on: each can be resolved by itself. Holds
-- stay. The caller counts them. Returns how many; 0 if it is not unknown (any more).
create function expose_messages(p_batch bigint) returns bigint language plpgsql
set plan_cache_mode = force_generic_plan as $$
declare b batch; a attempt; exposed bigint;
begin
  select * into b from batch where id = p_batch and state = 11;
  if not found then return 0; end if;
  -- Several have evidence at once: one exposes, the others find it done.
  perform from message m
   where m.campaign_id = b.campaign_id and m.id between b.first_id and b.last_id and m.state is null
   order by m.id for no key update;
  select * into b from batch where id = p_batch and state = 11;
  if not found then return 0; end if;
  select * into a from attempt where batch_id = b.id and n = b.attempt;
  with done as (
    update message m
       set state = 5, detail = a.detail, settled_at = coalesce(a.ended_at, clock_timestamp()),
           reason = case when a.detail = 'replica_died' then 'replica_died'
                         when a.status is null then 'no_answer' else 'unreadable_answer' end
     where m.campaign_id = b.campaign_id and m.id between b.first_id and b.last_id and m.state is null
    returning 1)
  select count(*) into exposed from done;
  update batch set state = 10, n = 0, segments = 0, unsure = unsure + exposed, done_at = clock_timestamp()
   where id = b.id and state = 11 and epoch = b.epoch;
  if not found then raise exception 'batch % moved while its messages were written', p_batch
    using errcode = 'serialization_failure'; end if;
  return exposed;
end $$;

create function expose_unknown(p_batch bigint) returns bigint language plpgsql as $$
declare exposed bigint := expose_messages(p_batch);
begin
  if exposed > 0 then
    perform count_messages((select campaign_id from batch where id = p_batch), 0, 0, 0, 0, exposed, 0, 0);
  end if;
  return exposed;
end $$;

-- The way back, for a result that comes for the whole attempt: what is still unknown, or waits to be sent again, is
-- spoken for by the batch. False: nothing of the kind.
create function conceal_unknown(p_batch bigint, p_attempt int) returns boolean language plpgsql
set plan_cache_mode = force_generic_plan as $$
declare b batch; since timestamptz; hidden int; found_n int; worth int;
begin
  select a.intent_at into since from attempt a where a.batch_id = p_batch and a.n = p_attempt and a.outcome = 'unknown';
  if not found then return false; end if;
  select * into b from batch where id = p_batch and attempt = p_attempt and state in (0, 1, 10);
  if not found then return false; end if;
  with done as (
    update message m set state = null, reason = null, detail = null, settled_at = null
     where m.campaign_id = b.campaign_id and m.id between b.first_id and b.last_id
       and m.state = 5 and m.settled_at >= since
    returning 1)
  select count(*) into hidden from done;
  select count(*), coalesce(sum(m.segments), 0) into found_n, worth from message m
   where m.campaign_id = b.campaign_id and m.id between b.first_id and b.last_id and m.state is null;
  if found_n = 0 then return false; end if;
  update batch set state = 11, n = found_n, segments = worth, unsure = greatest(0, unsure - hidden), told_at = null,
                   owner = null, slot = null, done_at = null
   where id = b.id and attempt = p_attempt and epoch = b.epoch and state = b.state and first_id = b.first_id
     and last_id = b.last_id;
  if not found then raise exception 'batch % moved while its messages were written', p_batch
    using errcode = 'serialization_failure'; end if;
  perform count_messages(b.campaign_id, 0, 0, 0, 0, -hidden, 0, 0);
  return true;
end $$;

-- As before; and what is unsure in it may lie on either side of the cut. Counted too high, it costs a look.
create or replace function cut_batch(p_batch bigint, p_most int) returns void language plpgsql as $$
declare b batch; cut bigint; worth int;
begin
  select * into b from batch where id = p_batch for no key update;
  if b.n <= p_most then return; end if;
  select m.id into cut from message m
   where m.campaign_id = b.campaign_id and m.id between b.first_id and b.last_id and m.state is null
   order by m.id offset p_most limit 1;
  select coalesce(sum(m.segments), 0) into worth from message m
   where m.campaign_id = b.campaign_id and m.id between cut and b.last_id and m.state is null;
  update batch set last_id = cut - 1, n = p_most, segments = b.segments - worth where id = p_batch;
  insert into batch (campaign_id, lane_id, tenant_id, account_id, first_id, last_id, n, segments, state, tries,
                     not_before, sender, pair, created_at, unsure)
  values (b.campaign_id, b.lane_id, b.tenant_id, b.account_id, cut, b.last_id, b.n - p_most, worth,
          b.state, b.tries, b.not_before, b.sender, b.pair, b.created_at, b.unsure);
end $$;

-- ------------------------------------------------------------------------------------------- evidence

-- Mitto has these messages of a batch, under these ids. Whatever was thought of them: unknown, given up by a person
-- (then paid anew, as overdue where the credits do not reach), or accepted without an id. Returns those that took
-- their id; one whose id is somebody else's, that has an id, or that is to be sent again, stays as it is.
create function accept_unsure(p_batch bigint, p_ids bigint[], p_provider_ids text[]) returns bigint[]
language plpgsql set plan_cache_mode = force_generic_plan as $$
declare
  b batch; ours bigint[]; was_unknown bigint; was_failed bigint; worth bigint; worth_anew bigint; payable bigint;
begin
  select * into b from batch where id = p_batch;
  if cardinality(p_ids) = 0 then return '{}'; end if;
  perform from campaign where id = b.campaign_id for no key update;      -- it may have to go on: locked before them
  perform from message m where m.campaign_id = b.campaign_id and m.id = any (p_ids) order by m.id for no key update;
  with known as (
    insert into provider_message (provider_id, campaign_id, message_id, account_id)
    select u.provider_id, b.campaign_id, u.id, b.account_id
      from unnest(p_ids, p_provider_ids) as u(id, provider_id)
      join message m on m.campaign_id = b.campaign_id and m.id = u.id
     where u.provider_id is not null and m.provider_id is null
       and (m.state in (5, 10) or (m.state = 40 and m.reason = 'verdict_failed'))
    on conflict do nothing returning message_id)
  select coalesce(array_agg(message_id), '{}') into ours from known;
  if cardinality(ours) = 0 then return ours; end if;
  with u as (select * from unnest(p_ids, p_provider_ids) as u(id, provider_id) where u.id = any (ours)),
  was as (select m.id, m.state, m.segments, m.reason from message m
           where m.campaign_id = b.campaign_id and m.id = any (ours)),
  done as (
    update message m set state = 10, provider_id = u.provider_id, reason = null, detail = null, finished_at = null,
                         settled_at = coalesce(m.settled_at, clock_timestamp())
      from u where m.campaign_id = b.campaign_id and m.id = u.id),
  -- of the batch that a message is in now: a retry of others may have cut it
  sure as (
    update batch x set unsure = greatest(0, x.unsure - k.n)
      from (select y.id, count(*)::int as n from was
             cross join lateral (select id from batch where first_id <= was.id order by first_id desc limit 1) y
             where was.state = 5 or was.reason like 'verdict%' group by y.id) k
     where x.id = k.id)
  select count(*) filter (where state = 5), count(*) filter (where state = 40),
         coalesce(sum(segments) filter (where state = 5), 0), coalesce(sum(segments) filter (where state = 40), 0)
    into was_unknown, was_failed, worth, worth_anew from was;
  perform count_messages(b.campaign_id, was_unknown + was_failed, 0, 0, -was_failed, -was_unknown, 0,
                         worth + worth_anew);
  perform move_credits(b.tenant_id, 'spend', worth, b.campaign_id, b.id, 'evidence');
  if worth_anew > 0 then
    select least(worth_anew, granted - spent - reserved) into payable from credit
     where tenant_id = b.tenant_id for no key update;
    perform move_credits(b.tenant_id, 'hold', payable, b.campaign_id, b.id, 'evidence');
    perform move_credits(b.tenant_id, 'spend', payable, b.campaign_id, b.id, 'evidence');
    update credit set overdue = overdue + worth_anew - payable where tenant_id = b.tenant_id;
    perform reopen_campaign(b.campaign_id);              -- it may have ended as failed
  end if;
  return ours;
end $$;

-- One message of an unknown attempt turned out to be at Mitto. False: it is resolved already, or the id is taken.
create function accept_message(p_batch bigint, p_message bigint, p_provider_id text) returns boolean
language plpgsql as $$
begin
  perform from campaign where id = (select campaign_id from batch where id = p_batch) for no key update;
  perform expose_unknown(p_batch);
  return cardinality(accept_unsure(p_batch, array[p_message], array[p_provider_id])) = 1;
end $$;

-- ------------------------------------------------------------------------------------------- settle

-- As before; but a second posting that somebody asked for is no breach, whichever of the two is heard of later.
create or replace function written_before(p_batch bigint, p_attempt int, p_outcome text, p_status int) returns boolean
language plpgsql as $$
begin
  update attempt a
     set outcome = case when p_outcome = 'duplicate' and (a.resent_at is not null or exists (
                               select from attempt x where x.batch_id = p_batch and x.resent_at < a.intent_at))
                        then 'duplicate_asked' else p_outcome end,
         status = p_status, detail = 'answered after a newer attempt'
   where a.batch_id = p_batch and a.n = p_attempt and (a.outcome is null or a.outcome in ('unknown', 'withdrawn'));
  return not found;
end $$;

-- Mitto's answer for an attempt that is not the batch's business any more. Messages that are still unsure take their
-- ids. True: all is said, or was written by an earlier call; false: something was posted again meanwhile.
create function answered_late(p_batch bigint, p_attempt int, p_ids bigint[], p_states smallint[],
                              p_provider_ids text[], p_status int) returns boolean
language plpgsql set plan_cache_mode = force_generic_plan as $$
declare ids bigint[]; provider_ids text[]; again bigint;
begin
  perform from attempt where batch_id = p_batch and n = p_attempt
                         and (outcome is null or outcome in ('unknown', 'withdrawn'));
  if not found then return true; end if;
  perform expose_unknown(p_batch);                       -- unknown by a newer attempt: so it was this one that arrived
  select coalesce(array_agg(u.id), '{}'), coalesce(array_agg(u.provider_id), '{}') into ids, provider_ids
    from unnest(p_ids, p_states, p_provider_ids) as u(id, state, provider_id)
   where u.state = 10 and u.provider_id is not null;
  perform accept_unsure(p_batch, ids, provider_ids);
  select count(*) into again
    from unnest(ids, provider_ids) as u(id, provider_id)
   where not exists (select from provider_message k where k.provider_id = u.provider_id and k.message_id = u.id);
  if again = 0 and not 40 = all (p_states) then
    perform end_attempt(p_batch, p_attempt, 'accepted', p_status, null, null);
    return true;
  end if;
  return written_before(p_batch, p_attempt, case when again > 0 then 'duplicate' else 'refused' end, p_status);
end $$;

-- Mitto took the request and decided item by item. Evidence for attempt p_attempt, whoever owns the batch now, and
-- also where its messages speak for themselves by now; false after a newer attempt.
-- p_states: 5 unknown, 10 accepted (without an id: known to be accepted, but not which id is whose), 40 refused.
-- An id that is already somebody's makes its message unknown.
create or replace function settle_items(p_batch bigint, p_attempt int, p_ids bigint[], p_states smallint[],
                                        p_provider_ids text[], p_details text[], p_bulk_id text, p_status int)
returns boolean language plpgsql set plan_cache_mode = force_generic_plan as $$
declare
  b batch; ours bigint[]; taken int; now_ timestamptz := clock_timestamp();
  accepted bigint; refused bigint; unknown_ bigint; worth_accepted bigint; worth_refused bigint;
  decided bigint[]; decided_ids text[];
begin
  select * into b from batch where id = p_batch;
  if b.state not in (3, 11) or b.attempt <> p_attempt then
    perform from campaign where id = b.campaign_id for no key update;
    if not conceal_unknown(p_batch, p_attempt) then
      return answered_late(p_batch, p_attempt, p_ids, p_states, p_provider_ids, p_status);
    end if;
    -- Those that have a verdict take what the answer says by themselves, the others with their batch.
    select coalesce(array_agg(u.id), '{}'), coalesce(array_agg(u.provider_id), '{}') into decided, decided_ids
      from unnest(p_ids, p_states, p_provider_ids) as u(id, state, provider_id)
      join message m on m.campaign_id = b.campaign_id and m.id = u.id and m.state is not null
     where u.state = 10 and u.provider_id is not null;
    select array_agg(u.id), array_agg(u.state), array_agg(u.provider_id), array_agg(u.detail)
      into p_ids, p_states, p_provider_ids, p_details
      from unnest(p_ids, p_states, p_provider_ids, p_details) as u(id, state, provider_id, detail)
      join message m on m.campaign_id = b.campaign_id and m.id = u.id and m.state is null;
    perform accept_unsure(p_batch, decided, decided_ids);
  end if;
  with u as (
    select * from unnest(p_ids, p_states, p_provider_ids) as u(id, state, provider_id)),
  ins as (
    insert into provider_message (provider_id, campaign_id, message_id, account_id)
    select u.provider_id, b.campaign_id, u.id, b.account_id from u where u.state = 10 and u.provider_id is not null
    on conflict do nothing returning message_id)
  select array_agg(message_id) into ours from ins;
  ours := coalesce(ours, '{}');
  select count(*) into taken from unnest(p_states, p_provider_ids) as u(state, provider_id)
   where u.state = 10 and u.provider_id is not null;
  with u as (
    select u.id, u.provider_id, u.detail,
           case when u.state = 10 and cardinality(ours) < taken and u.provider_id is not null and u.id <> all (ours)
                then 5::smallint else u.state end as state
      from unnest(p_ids, p_states, p_provider_ids, p_details) as u(id, state, provider_id, detail)),
  done as (
    update message m
       set state = u.state, provider_id = case when u.state = 10 then u.provider_id end, settled_at = now_,
           finished_at = case when u.state = 40 then now_ end, detail = u.detail,
           reason = case u.state when 40 then 'refused_by_provider' when 5 then 'unreadable_answer' end
      from u
     where m.campaign_id = b.campaign_id and m.id = u.id and m.state is null
       and m.id between b.first_id and b.last_id        -- or a table never analysed is read whole, for every batch
    returning m.state, m.segments)
  select count(*) filter (where state = 10), count(*) filter (where state = 40), count(*) filter (where state = 5),
         coalesce(sum(segments) filter (where state = 10), 0), coalesce(sum(segments) filter (where state = 40), 0)
    into accepted, refused, unknown_, worth_accepted, worth_refused from done;
  update batch set state = 10, n = 0, segments = 0, owner = null, bulk_id = p_bulk_id, done_at = now_,
                   unsure = unsure + unknown_
   where id = b.id and state in (3, 11) and attempt = p_attempt;
  if not found then raise exception 'batch % moved while its answer was written', p_batch
    using errcode = 'serialization_failure'; end if;
  perform count_messages(b.campaign_id, accepted, 0, 0, refused, unknown_, 0, worth_accepted);
  perform move_credits(b.tenant_id, 'spend', worth_accepted, b.campaign_id, b.id, 'accepted');
  perform move_credits(b.tenant_id, 'release', worth_refused, b.campaign_id, b.id, 'refused');
  perform end_attempt(b.id, p_attempt, 'accepted', p_status, null, null);
  return true;
end $$;

-- An answer of an account that does not keep the order. Where every item has an id all were accepted, and which id is
-- whose is asked later; where some have none, nobody can say whose those are, so all are unknown until then.
create function settle_unmapped(p_batch bigint, p_attempt int, p_ids bigint[], p_states smallint[],
                                p_provider_ids text[], p_details text[], p_bulk_id text, p_status int)
returns boolean language plpgsql as $$
declare state_ smallint := case when 10 = all (p_states) then 10 else 5 end;
begin
  insert into unmapped_id (provider_id, account_id, batch_id, attempt)
  select u.provider_id, b.account_id, b.id, p_attempt
    from batch b, unnest(p_provider_ids) as u(provider_id)
   where b.id = p_batch and u.provider_id is not null
     and not exists (select from provider_message k where k.provider_id = u.provider_id)
  on conflict do nothing;
  return settle_items(p_batch, p_attempt, p_ids, array_fill(state_, array[cardinality(p_ids)]),
                      array_fill(null::text, array[cardinality(p_ids)]), p_details, p_bulk_id, p_status);
end $$;

-- As before; and a result also finds an attempt whose messages speak for themselves by now.
create or replace function settle_batch(p_batch bigint, p_attempt int, p_action text, p_outcome text, p_status int,
                                        p_detail text, p_delay_seconds float8, p_most int, p_refusal text)
returns text language plpgsql as $$
declare b batch; l lane; alike boolean; delay interval := make_interval(secs => p_delay_seconds);
begin
  if p_action = 'refused' then                          -- may pause the campaign: locked before its batch, as everywhere
    perform from campaign where id = (select campaign_id from batch where id = p_batch) for no key update;
  end if;
  select * into b from batch
   where id = p_batch and state in (3, 11) and attempt = p_attempt for no key update;
  if not found and p_action <> 'unknown' and conceal_unknown(p_batch, p_attempt) then
    select * into b from batch where id = p_batch and state = 11 and attempt = p_attempt for no key update;
  end if;
  if b.id is null then
    return case when written_before(p_batch, p_attempt, p_outcome, p_status) then 'settled' else 'late' end;
  end if;
  perform end_attempt(b.id, p_attempt, p_outcome, p_status, p_detail, p_refusal);
  if p_action = 'unknown' then
    update batch set state = 11, owner = null where id = b.id;
    return 'unknown';
  end if;
  select * into l from lane where id = b.lane_id;
  if p_action = 'again' and b.tries + 1 >= p_most then
    perform refuse_batch(b.id, 'server_error', p_detail);
    return 'failed';
  end if;
  if p_action = 'refused' then
    alike := b.campaign_id <> 0 and not l.closed and exists (
      select from attempt x
       where x.campaign_id = b.campaign_id and x.pair = b.pair and x.batch_id <> b.id and x.refusal = p_refusal);
    -- Both halves, the same words: it is not one bad item. Ask a person instead of asking item by item.
    if alike then
      perform reopen_campaign(b.campaign_id);
      perform pause_campaign(b.campaign_id, 'REFUSED_BY_PROVIDER', p_detail);
    end if;
    if b.n = 1 then
      perform refuse_batch(b.id, 'refused_by_provider', p_detail);
      return case when alike then 'lane_paused' else 'failed' end;
    elsif alike then
      update batch set state = 0, owner = null, slot = null, pair = null where id = b.id;
      perform wake_lane(b.lane_id, b.first_id);
      return 'lane_paused';
    end if;
  end if;
  if l.closed then
    perform cancel_batch(b.id, '{3,11}');
    return 'cancelled';
  end if;
  if p_action = 'refused' then
    perform split_batch(b.id, l.id);
  elsif p_action = 'again' then
    update batch set state = 1, owner = null, slot = null, tries = tries + 1,
                     not_before = clock_timestamp() + delay * power(2, b.tries) where id = b.id;
  else
    update batch set state = case when p_delay_seconds > 0 or tries > 0 then 1 else 0 end, owner = null, slot = null,
                     not_before = clock_timestamp() + delay where id = b.id;
  end if;
  if b.state = 11 then perform reopen_campaign(b.campaign_id); end if;
  perform wake_lane(b.lane_id, b.first_id);
  return case p_action when 'refused' then 'split' when 'again' then 'waiting' else 'ready' end;
end $$;

-- As before; and what was reaped and meanwhile speaks for itself comes back too. A single message whose caller said
-- so may wait to be sent again under the same lease: then it is in its place already.
create or replace function withdraw(p_batch bigint, p_epoch int, p_why text) returns boolean language plpgsql as $$
declare b batch;
begin
  select * into b from batch where id = p_batch and epoch = p_epoch and state in (2, 3, 11) for no key update;
  if not found then
    select * into b from batch where id = p_batch and epoch = p_epoch and state = 10;
    if not found or not conceal_unknown(b.id, b.attempt) then return false; end if;
    select * into b from batch where id = p_batch and epoch = p_epoch and state = 11 for no key update;
  end if;
  update batch set state = case when tries > 0 then 1 else 0 end, owner = null, slot = null,
                   not_before = case when tries > 0 then clock_timestamp() end
   where id = b.id;
  if b.state <> 2 then
    update attempt set outcome = 'withdrawn', detail = p_why, ended_at = clock_timestamp()
     where batch_id = b.id and n = b.attempt and (outcome is null or outcome = 'unknown');
  end if;
  if b.state = 11 then perform reopen_campaign(b.campaign_id); end if;
  perform give_back(b.account_id, b.tenant_id, b.slot, coalesce(b.cost, b.n));
  if (select closed from lane where id = b.lane_id) then
    perform cancel_batch(b.id, '{0,1}');
  else
    perform wake_lane(b.lane_id, b.first_id);
  end if;
  return true;
end $$;

-- ------------------------------------------------------------------------------------------- verdicts

-- Unknown single messages whose caller wants them rather twice than never: to be tried once more, within the tries
-- that there are. Their first attempt stays unsure, so that its evidence is recognised.
create function resend_asked(p_most int, p_delay_seconds float8) returns bigint language plpgsql as $$
declare b record; resent bigint := 0;
begin
  for b in
    select id, attempt, lane_id, first_id, tries from batch
     where state = 11 and on_unknown = 'resend' and tries + 1 < p_most order by id for no key update skip locked
  loop
    update batch set state = 1, owner = null, slot = null, tries = tries + 1, unsure = unsure + n,
                     not_before = clock_timestamp() + make_interval(secs => p_delay_seconds * power(2, b.tries))
     where id = b.id and state = 11;
    update attempt set resent_at = clock_timestamp(), detail = concat_ws('; ', detail, 'sent again, as asked')
     where batch_id = b.id and n = b.attempt;
    perform wake_lane(b.lane_id, b.first_id);
    resent := resent + 1;
  end loop;
  return resent;
end $$;

-- A person's word on unknown messages of a campaign, which the caller has locked: those of p_ids, or of one batch, or
-- of the attempts that ended before a time. early: an attempt is too young to be sent again before then; the caller
-- rolls back. What is in a batch that is being sent again just now is left as it is.
create function give_verdict(p_campaign bigint, p_as text, p_ids bigint[], p_batch bigint, p_before timestamptz,
                             p_wait_seconds float8, out resolved bigint, out early timestamptz)
language plpgsql set plan_cache_mode = force_generic_plan as $$
declare b record; tenant bigint; exposed bigint := 0; worth bigint := 0; n_ bigint; worth_ bigint; lanes bigint[] := '{}';
begin
  resolved := 0;
  for b in
    -- the newest attempt in the range, which a part of a batch that was cut has in common with the other
    select x.id, x.tenant_id, x.state, x.first_id, x.last_id, x.lane_id, a.intent_at, a.ended_at
      from batch x
      cross join lateral (
        select t.intent_at, t.ended_at from attempt t
         where t.campaign_id = p_campaign and t.first_id between x.first_id - 499 and x.last_id
           and t.last_id >= x.first_id
         order by t.intent_at desc limit 1) a
     where x.campaign_id = p_campaign and (x.state = 11 or x.unsure > 0)
       and (p_batch is null or x.id = p_batch)
       and (p_ids is null or exists (select from unnest(p_ids) as u(id) where u.id between x.first_id and x.last_id))
       and (p_before is null or x.state <> 11 or a.ended_at < p_before)
     order by x.id
  loop
    if p_as = 'resend' and b.state in (10, 11) and exists (
      select from message m where m.campaign_id = p_campaign and m.id between b.first_id and b.last_id
         and (m.state = 5 or (m.state is null and b.state = 11)) and (p_ids is null or m.id = any (p_ids))
         and (p_before is null or m.state is null or coalesce(m.settled_at, m.created_at) < p_before))
    then
      early := greatest(early, b.intent_at + make_interval(secs => p_wait_seconds));
      if early > clock_timestamp() then return; end if;
    end if;
    tenant := b.tenant_id;
    exposed := exposed + expose_messages(b.id);
    continue when p_as = 'resend' and b.state not in (10, 11);
    with done as (
      update message m
         set state = case p_as when 'sent' then 10 when 'failed' then 40 end,
             reason = case p_as when 'sent' then 'verdict_sent' when 'failed' then 'verdict_failed' end,
             detail = case when p_as <> 'resend' then m.detail end,
             settled_at = case when p_as <> 'resend' then m.settled_at end,
             finished_at = case when p_as = 'failed' then clock_timestamp() end
       where m.campaign_id = p_campaign and m.id between b.first_id and b.last_id and m.state = 5
         and (p_ids is null or m.id = any (p_ids)) and (p_before is null or coalesce(m.settled_at, m.created_at) < p_before)
      returning m.segments)
    select count(*), coalesce(sum(segments), 0) into n_, worth_ from done;
    resolved := resolved + n_; worth := worth + worth_;
    continue when n_ = 0 or p_as <> 'resend';
    update batch set state = 0, n = n_, segments = worth_, tries = 0, owner = null, slot = null, not_before = null,
                     pair = null, done_at = null
     where id = b.id and state = 10;
    if not found then raise exception 'batch % moved while its messages were written', b.id
      using errcode = 'serialization_failure'; end if;
    update attempt set resent_at = clock_timestamp(), detail = concat_ws('; ', detail, 'sent again, as asked')
     where campaign_id = p_campaign and first_id between b.first_id - 499 and b.last_id and last_id >= b.first_id
       and outcome in ('unknown', 'accepted') and resent_at is null;
    lanes := array_append(lanes, b.lane_id);
  end loop;
  early := null;
  perform count_messages(p_campaign, case when p_as = 'sent' then resolved else 0 end, 0, 0,
                         case when p_as = 'failed' then resolved else 0 end, exposed - resolved, 0,
                         case when p_as = 'sent' then worth else 0 end);
  if p_as <> 'resend' then
    perform move_credits(tenant, case p_as when 'sent' then 'spend' else 'release' end, worth, p_campaign, p_batch,
                         'verdict_' || p_as);
  end if;
  if resolved > 0 then perform reopen_campaign(p_campaign); end if;
  perform wake_lane(u.id, 0) from (select distinct unnest(lanes) as id order by 1) u;
end $$;

-- Unknown since long before: each message speaks for itself, and a person is told, once; a row a batch. One replica
-- at a time does.
create function expose_old(p_seconds float8, p_most int)
returns table (campaign_id bigint, tenant_id bigint, n bigint) language plpgsql as $$
#variable_conflict use_column
declare b record;
begin
  if not pg_try_advisory_xact_lock(7276305) then return; end if;
  for b in
    select x.id, x.campaign_id, x.tenant_id, x.first_id, x.last_id
      from batch x left join attempt a on a.batch_id = x.id and a.n = x.attempt
     where (x.state = 11 or x.unsure > 0) and x.state >= 10 and x.told_at is null
       and coalesce(a.ended_at, x.created_at) < clock_timestamp() - make_interval(secs => p_seconds)
     order by x.id limit p_most
  loop
    perform expose_unknown(b.id);
    update batch set told_at = clock_timestamp() where id = b.id;
    campaign_id := b.campaign_id; tenant_id := b.tenant_id;
    select count(*) into n from message m
     where m.campaign_id = b.campaign_id and m.id between b.first_id and b.last_id and m.state = 5;
    if n > 0 then return next; end if;
  end loop;
  -- After a week nothing is heard any more of what has a verdict or was sent again: only what is unknown is looked for.
  update batch x
     set told_at = clock_timestamp(),
         unsure = (select count(*) from message m where m.campaign_id = x.campaign_id
                      and m.id between x.first_id and x.last_id and m.state = 5)
   where x.id in (select y.id from batch y
                   where y.unsure > 0 and y.state = 10 and y.told_at < clock_timestamp() - interval '7 days'
                   order by y.id limit p_most)
     and x.state = 10 and x.told_at < clock_timestamp() - interval '7 days';
end $$;

-- ------------------------------------------------------------------------------------------- candidates

-- Which messages of an account an id of Mitto's may belong to: those to this number (or the one that the reference
-- names), at attempts during which it was created. situation: open (it would take the id) | sending (not decided yet) |
-- taken (it has an id or is to be sent again, but an attempt of it may have brought this id as well).
-- Reads what is unresolved and, by number, one message of each campaign; never a campaign's messages.
create function candidates(p_account bigint, p_phone bigint, p_message bigint, p_created_at timestamptz,
                           p_slack_seconds float8)
returns table (batch_id bigint, message_id bigint, situation text, sender text, text_ text)
language plpgsql stable set plan_cache_mode = force_generic_plan
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off as $$
#variable_conflict use_column
declare slack interval := make_interval(secs => p_slack_seconds);
begin
  return query
  with open_ as (
    select b.campaign_id, b.first_id from batch b where b.account_id = p_account and (b.state = 11 or b.unsure > 0)
    union all
    select b.campaign_id, b.first_id from lane l join batch b on b.lane_id = l.id and b.state = 3
     where l.account_id = p_account),
  found as (
    select m.campaign_id, m.id from (select distinct campaign_id from open_ where campaign_id <> 0) o
      join message m on m.campaign_id = o.campaign_id and m.campaign_id <> 0 and m.phone = p_phone
     where p_message is null
    union all
    select m.campaign_id, m.id from open_ o
      join message m on m.campaign_id = 0 and m.id = o.first_id and m.phone = p_phone
     where o.campaign_id = 0 and p_message is null
    union all
    select m.campaign_id, m.id
      from (select * from batch where first_id <= p_message order by first_id desc limit 1) o
      join message m on m.campaign_id = o.campaign_id and m.id = p_message and m.phone = p_phone),
  tried as (
    select b.id as batch_id, m.id as message_id, b.sender, m.text,
           case when a.outcome is null then 'sending'
                when a.outcome in ('duplicate', 'duplicate_asked') then 'taken'
                when a.outcome not in ('unknown', 'accepted') then null
                when m.state is null and b.state = 11 then 'open'
                when m.provider_id is null and (m.state in (5, 10) or m.reason = 'verdict_failed') then 'open'
                when a.resent_at is not null and (m.settled_at is null or m.settled_at > a.resent_at) then 'taken'
           end as situation,
           -- a replica that was taken for dead may have been stopped, and have gone on later
           a.intent_at - slack <= p_created_at
           and (a.ended_at is null or a.detail like 'replica_died%' or p_created_at <= a.ended_at + slack) as fits
      from found f
      join message m on m.campaign_id = f.campaign_id and m.id = f.id
      cross join lateral (select * from batch where first_id <= f.id order by first_id desc limit 1) b
      join attempt a on a.campaign_id = f.campaign_id and a.first_id between f.id - 499 and f.id and a.last_id >= f.id
     where b.account_id = p_account)
  select distinct t.batch_id, t.message_id, t.situation, t.sender, t.text from tried t
   where t.situation is not null and (t.fits or p_message is not null);
end $$;

-- Which message of its batch an unmapped id belongs to: the one to this number. False: none, or it has an id.
create function map_id(p_provider_id text, p_phone bigint) returns boolean
language plpgsql set plan_cache_mode = force_generic_plan as $$
declare u unmapped_id; message_ bigint;
begin
  select * into u from unmapped_id where provider_id = p_provider_id for update;
  if not found then return false; end if;
  select m.id into message_
    from attempt a
    join message m on m.campaign_id = a.campaign_id and m.campaign_id <> 0 and m.phone = p_phone
                  and m.id between a.first_id and a.last_id
   where a.batch_id = u.batch_id and a.n = u.attempt;
  if message_ is null or cardinality(accept_unsure(u.batch_id, array[message_], array[p_provider_id])) = 0 then
    return false;
  end if;
  delete from unmapped_id where provider_id = p_provider_id;
  return true;
end $$;
