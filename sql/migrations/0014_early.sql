-- oldest code: 3
-- Early receipts are found by their index, however many of their old versions a long snapshot keeps.

-- They come and go, so the planner mostly sees an empty table, where reading a whole index costs what one look at it
-- does; a join or an order by that this index has anyway then walks through all old versions for each receipt. So
-- they are looked up by `= any` alone, which only its own index serves, and what is known of them is joined after it.

-- The largest state seen wins, so order and repeats do not matter. p_accounts names the account where the webhook's
-- secret told it: an id of another account is then not touched. Ids that are not ours yet are kept, each with the
-- states that say more than what is kept of it already. Nested loops pinned as in 0007.
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
  furthest as (
    select distinct on (provider_id, account_id) * from (
      select provider_id, account_id, state, at, description, true as is_new from matched where message_id is null
      union all
      select e.provider_id, e.account_id, e.state, null, null, false from early_receipt e
       where e.provider_id = any (array(select provider_id from matched where message_id is null))) x
     order by provider_id, account_id, state desc, is_new),   -- what is kept already stays if it says as much
  early as (
    insert into early_receipt (provider_id, account_id, state, at, description)
    select provider_id, account_id, state, at, description from furthest where is_new
    returning 1)
  select (select count(*) from moved), (select count(*) from early) into updated, kept;
end $$;

-- Early receipts whose message is known by now. p_ids null: of those that came in the last minute; see
-- sweep_early_receipts for the others. Meant for a new snapshot, after the commit of the settle or the receipt that
-- may have missed the other. Locked in one order, so that those who look at once wait and do not deadlock.
create or replace function rejoin_receipts(p_ids text[]) returns bigint
language plpgsql set plan_cache_mode = force_generic_plan
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off as $$
declare
  since timestamptz := clock_timestamp() - interval '1 minute';
  found_ bigint[]; accounts bigint[]; ids text[]; states smallint[]; ats timestamptz[]; descriptions text[];
begin
  if p_ids is null then
    select array_agg(id) into found_ from early_receipt where received_at > since;
  else
    select array_agg(id) into found_ from early_receipt where provider_id = any (p_ids);
  end if;
  if found_ is null then return 0; end if;
  select array_agg(id) into found_
    from (select e.id from early_receipt e
           where e.id = any (found_)
             and exists (select from provider_message k
                          where k.provider_id = e.provider_id and k.account_id = coalesce(e.account_id, k.account_id)
                         offset 0)                            -- one by one: as a join it would be an order by its id
           order by e.id for update of e) f;
  if found_ is null then return 0; end if;
  with e as (delete from early_receipt where id = any (found_) returning *)
  select array_agg(account_id), array_agg(provider_id), array_agg(state), array_agg(at), array_agg(description)
    into accounts, ids, states, ats, descriptions from e;
  return (select updated from apply_receipts(accounts, ids, states, ats, descriptions));
end $$;
