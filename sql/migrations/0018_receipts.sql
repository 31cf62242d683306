-- oldest code: 3
-- Receipts of what is on its way, nearly all, cost one walk: each message is found once and written where it is found.

-- The largest state seen wins, so order and repeats do not matter. p_accounts names the account where the webhook's
-- secret told it: an id of another account is then not touched. Ids that are not ours yet are kept, each with the states
-- that say more than what is kept of it already. The order is one for all, so that two wait and do not deadlock; of
-- several for one message the update takes the first. Nested loops pinned as in 0007.
create or replace function apply_receipts(p_accounts bigint[], p_ids text[], p_states smallint[], p_at timestamptz[],
                                          p_descriptions text[], out updated bigint, out kept bigint)
language plpgsql set plan_cache_mode = force_generic_plan
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off as $$
declare nobodys bigint[]; back bigint;
begin
  kept := 0;
  with found as materialized (
    select k.campaign_id, k.message_id, u.state, u.at, u.description, u.place
      from unnest(p_accounts, p_ids, p_states, p_at, p_descriptions) with ordinality
             as u(account_id, provider_id, state, at, description, place)
      left join provider_message k
        on k.provider_id = u.provider_id and k.account_id = coalesce(u.account_id, k.account_id)
     order by k.campaign_id, k.message_id, u.state desc, u.at),
  moved as (
    update message m
       set state = f.state,
           finished_at = case when f.state >= 20 then coalesce(f.at, clock_timestamp()) end,
           reason = case when f.state = 20 then 'delivery_failed' end,
           detail = case when f.state = 20 then f.description end
      from found f
     where m.campaign_id = f.campaign_id and m.id = f.message_id and m.state in (10, 11) and f.state > m.state
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
