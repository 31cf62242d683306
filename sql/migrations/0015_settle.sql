-- oldest code: 3
-- An answer's ids are written in their order, and its messages found by one walk along their range, whatever the planner
-- knows.

-- A result makes a row longer by its id and its time, so that a little less than half a page must be taken: at 50 every
-- sixth message of a usual length found no room beside itself, wrote both indexes, and the table was a tenth larger.
alter table message set (fillfactor = 45);

-- What the answer says of each message of a batch's range that does not speak for itself yet; counts, and credits.
-- Pinned, as the plan may be made before the table was ever analysed: then each message was looked up for itself, and
-- a connection keeps its plan.
create function write_results(p_campaign bigint, p_first bigint, p_last bigint, p_ids bigint[], p_states smallint[],
                              p_provider_ids text[], p_details text[], p_at timestamptz,
                              out accepted bigint, out refused bigint, out unknown_ bigint,
                              out worth_accepted bigint, out worth_refused bigint)
language plpgsql set plan_cache_mode = force_generic_plan
set enable_seqscan = off set enable_bitmapscan = off set enable_nestloop = off as $$
begin
  with done as (
    update message m
       set state = u.state, provider_id = case when u.state = 10 then u.provider_id end, settled_at = p_at,
           finished_at = case when u.state = 40 then p_at end, detail = u.detail,
           reason = case u.state when 40 then 'refused_by_provider' when 5 then 'unreadable_answer' end
      from unnest(p_ids, p_states, p_provider_ids, p_details) as u(id, state, provider_id, detail)
     where m.campaign_id = p_campaign and m.id between p_first and p_last and m.id = u.id and m.state is null
    returning m.state, m.segments)
  select count(*) filter (where state = 10), count(*) filter (where state = 40), count(*) filter (where state = 5),
         coalesce(sum(segments) filter (where state = 10), 0), coalesce(sum(segments) filter (where state = 40), 0)
    into accepted, refused, unknown_, worth_accepted, worth_refused from done;
end $$;

-- Mitto took the request and decided item by item. Evidence for attempt p_attempt, whoever owns the batch now, and
-- also where its messages speak for themselves by now; false after a newer attempt.
-- p_states: 5 unknown, 10 accepted (without an id: known to be accepted, but not which id is whose), 40 refused.
-- An id that is already somebody's makes its message unknown.
create or replace function settle_items(p_batch bigint, p_attempt int, p_ids bigint[], p_states smallint[],
                                        p_provider_ids text[], p_details text[], p_bulk_id text, p_status int)
returns boolean language plpgsql set plan_cache_mode = force_generic_plan as $$
declare
  b batch; ours bigint[]; now_ timestamptz := clock_timestamp(); decided bigint[]; decided_ids text[]; r record;
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
  begin  -- nearly always all ids are new; in their order, so that neighbours share a page, and two wait in one order
    insert into provider_message (provider_id, campaign_id, message_id, account_id)
    select u.provider_id, b.campaign_id, u.id, b.account_id
      from unnest(p_ids, p_states, p_provider_ids) as u(id, state, provider_id)
     where u.state = 10 and u.provider_id is not null order by u.provider_id;
  exception when unique_violation then
    with ins as (
      insert into provider_message (provider_id, campaign_id, message_id, account_id)
      select u.provider_id, b.campaign_id, u.id, b.account_id
        from unnest(p_ids, p_states, p_provider_ids) as u(id, state, provider_id)
       where u.state = 10 and u.provider_id is not null order by u.provider_id
      on conflict do nothing returning message_id)
    select coalesce(array_agg(message_id), '{}') into ours from ins;
    select array_agg(case when u.state = 10 and u.provider_id is not null and u.id <> all (ours) then 5 else u.state end
                     order by u.place) into p_states
      from unnest(p_ids, p_states, p_provider_ids) with ordinality as u(id, state, provider_id, place);
  end;
  select * into r from write_results(b.campaign_id, b.first_id, b.last_id, p_ids, p_states, p_provider_ids, p_details,
                                     now_);
  update batch set state = 10, n = 0, segments = 0, owner = null, bulk_id = p_bulk_id, done_at = now_,
                   unsure = unsure + r.unknown_
   where id = b.id and state in (3, 11) and attempt = p_attempt;
  if not found then raise exception 'batch % moved while its answer was written', p_batch
    using errcode = 'serialization_failure'; end if;
  perform count_messages(b.campaign_id, r.accepted, 0, 0, r.refused, r.unknown_, 0, r.worth_accepted);
  perform move_credits(b.tenant_id, 'spend', r.worth_accepted, b.campaign_id, b.id, 'accepted');
  perform move_credits(b.tenant_id, 'release', r.worth_refused, b.campaign_id, b.id, 'refused');
  perform end_attempt(b.id, p_attempt, 'accepted', p_status, null, null);
  return true;
end $$;
