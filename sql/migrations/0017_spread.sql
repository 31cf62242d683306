-- oldest code: 3
-- Receipts lock nothing before they write. What is looked for is found at once, whatever a long snapshot keeps. And slots
-- are spread over the window.

-- The largest state seen wins, so order and repeats do not matter. p_accounts names the account where the webhook's
-- secret told it: an id of another account is then not touched. A message that was moved by somebody else since it was
-- read is left as it is, and all are looked at once more; the order is one for all, so that two wait and do not
-- deadlock. Ids that are not ours yet are kept, each with the states that say more than what is kept of it already.
-- Nested loops pinned as in 0007.
create or replace function apply_receipts(p_accounts bigint[], p_ids text[], p_states smallint[], p_at timestamptz[],
                                          p_descriptions text[], out updated bigint, out kept bigint)
language plpgsql set plan_cache_mode = force_generic_plan
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off as $$
declare found_ bigint; moved_ bigint; nobodys bigint[];
begin
  updated := 0; kept := 0;
  loop
    with r as (
      select distinct on (u.provider_id, u.account_id) u.*
        from unnest(p_accounts, p_ids, p_states, p_at, p_descriptions) with ordinality
             as u(account_id, provider_id, state, at, description, place)
       order by u.provider_id, u.account_id, u.state desc, u.at),
    matched as (
      select r.*, k.campaign_id, k.message_id from r
        left join provider_message k
          on k.provider_id = r.provider_id and k.account_id = coalesce(r.account_id, k.account_id)),
    best as (
      select distinct on (campaign_id, message_id) * from matched where message_id is not null
       order by campaign_id, message_id, state desc, at),
    old as materialized (
      select m.campaign_id, m.id, m.state as was, best.state, best.at, best.description
        from best join message m on m.campaign_id = best.campaign_id and m.id = best.message_id
       where m.state in (10, 11, 20) and best.state > m.state
       order by m.campaign_id, m.id),
    moved as (
      update message m
         set state = old.state,
             finished_at = case when old.state >= 20 then coalesce(old.at, clock_timestamp()) end,
             reason = case when old.state = 20 then 'delivery_failed' end,
             detail = case when old.state = 20 then old.description end
        from old where m.campaign_id = old.campaign_id and m.id = old.id and m.state = old.was
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
             delivery_failed = c.delivery_failed + excluded.delivery_failed)
    select (select count(*) from old), (select count(*) from moved),
           (select array_agg(place) from matched where message_id is null) into found_, moved_, nobodys;
    updated := updated + moved_;
    exit when moved_ = found_;
  end loop;
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
       order by provider_id, account_id, state desc, is_new),   -- what is kept already stays if it says as much
    early as (
      insert into early_receipt (provider_id, account_id, state, at, description)
      select provider_id, account_id, state, at, description from furthest where is_new
      returning 1)
    select count(*) into kept from early;
  end if;
end $$;

-- The batch is found by its id alone, as in `intent`.
-- A slot that was missed between intent and first byte, for another one in the same round trip: the grant moves, lease
-- and intent stay. As soon as every limit has room between the slots that were given already, which nearly always is at
-- once, as the old one is given back: behind all of them it would leave a hole in this second and so in those that
-- follow. Else up to two horizons ahead, as others have the next slots already. Null: there is none soon, or nothing may
-- leave now. For a single message a campaign's batch makes way, as in `claim`.
create or replace function retake_slot(p_batch bigint, p_epoch int, p_lead bigint, p_horizon bigint, p_global int) returns bigint
language plpgsql as $$
declare
  b batch; acc traffic_account; te tenant; a rate; g rate; am rate; t rate; tm rate; s bigint; way bigint; now_ bigint; rps int;
  due int; soonest bigint;
begin
  perform set_config('synchronous_commit', 'off', true);   -- forgotten, it would take the limiter's state along
  select * into b from batch where id = p_batch for no key update;
  if not found or (b.state, b.epoch) is distinct from (3::smallint, p_epoch) then return null; end if;
  select * into te from tenant where id = b.tenant_id;
  due := coalesce(b.cost, b.n);
  a := rate_lock(1, b.account_id, p_horizon);
  perform give_back(b.account_id, b.tenant_id, b.slot, due);
  select * into acc from traffic_account where id = b.account_id;
  a := rate_lock(1, b.account_id, p_horizon);
  now_ := clock_us();
  rps := limit_now(acc.requests_per_second, acc.ceiling, acc.ceiling_at);
  s := greatest(now_ + p_lead, rate_earliest(a, 1, rps), a.last + pace_us(a.last_cost, rps));
  if p_global is not null then
    g := rate_lock(0, 0, p_horizon);
    s := greatest(s, rate_earliest(g, 1, p_global));
  end if;
  if acc.messages_per_second is not null then
    am := rate_lock(2, b.account_id, p_horizon);
    s := greatest(s, rate_earliest(am, due, acc.messages_per_second),
                  am.last + pace_us(am.last_cost, acc.messages_per_second));
  end if;
  t := rate_lock(3, b.tenant_id, p_horizon);
  s := greatest(s, rate_earliest(t, 1, te.requests_per_second));
  if te.messages_per_second is not null then
    tm := rate_lock(4, b.tenant_id, p_horizon);
    s := greatest(s, rate_earliest(tm, due, te.messages_per_second));
  end if;
  soonest := greatest(now_ + p_lead, a.closed_until, g.closed_until, am.closed_until, t.closed_until, tm.closed_until);
  if rate_fits_at(a, soonest, 1, rps) and rate_fits_at(t, soonest, 1, te.requests_per_second)
     and (p_global is null or rate_fits_at(g, soonest, 1, p_global))
     and (acc.messages_per_second is null or rate_fits_at(am, soonest, due, acc.messages_per_second))
     and (te.messages_per_second is null or rate_fits_at(tm, soonest, due, te.messages_per_second)) then
    s := soonest;                                       -- its own place, most of the time
  elsif b.campaign_id = 0 and s > soonest + 5000 then
    way := make_way(acc, b.tenant_id,
                    rate_fits(t, 1, te.requests_per_second)
                    and (te.messages_per_second is null or rate_fits(tm, due, te.messages_per_second)),
                    due, rps, s - 5000, soonest);
    s := coalesce(way, s);
  end if;
  if s > now_ + 2 * p_horizon or acc.paused_reason is not null or wait_until(acc.blocked_until, now_) > now_
     or (select l.paused or l.closed from lane l where l.id = b.lane_id) then
    s := null;
  else
    perform rate_keep(rate_take(rate_lock(1, b.account_id, p_horizon), s, 1));
    if p_global is not null then perform rate_keep(rate_take(rate_lock(0, 0, p_horizon), s, 1)); end if;
    if acc.messages_per_second is not null then
      perform rate_keep(rate_take(rate_lock(2, b.account_id, p_horizon), s, due));
    end if;
    perform rate_keep(rate_take(rate_lock(3, b.tenant_id, p_horizon), s, 1));
    if te.messages_per_second is not null then
      perform rate_keep(rate_take(rate_lock(4, b.tenant_id, p_horizon), s, due));
    end if;
    update attempt set slot_at = from_us(s) where batch_id = b.id and n = b.attempt;
  end if;
  update batch set slot = s where id = b.id;
  return s;
end $$;

-- The first slot from p_from and before p_until that a campaign's batch has been given and has written no intent for:
-- the batch is taken back. It had taken at least p_cost of the account's limits; of another tenant's only where p_fits.
-- Null: there is none. Single messages get no more than half of what left within the last minute and is on its way like
-- this: with more of them, campaigns keep the slots that they are given.
create or replace function make_way(acc traffic_account, p_tenant bigint, p_fits boolean, p_cost int, p_rps int,
                                    p_until bigint, p_from bigint)
returns bigint language plpgsql set enable_sort = off as $$
declare b batch;
begin
  select x.* into b from batch x join lane l on l.id = x.lane_id
   where x.account_id = acc.id and x.state = 2 and x.campaign_id <> 0 and x.slot >= p_from and x.slot < p_until
     and x.cost >= p_cost and (p_fits or x.tenant_id = p_tenant) and not l.closed
     and (select count(*) < 2 * count(*) filter (where y.campaign_id <> 0) from batch y
           where y.account_id = acc.id and y.state in (2, 3) and y.slot > p_from - 60000000)
   order by x.slot limit 1 for no key update of x skip locked;
  if not found then return null; end if;
  perform take_back(b, acc, p_rps, 'made way for a single message');
  return b.slot;
end $$;

-- A tenant's credits as they stand.
create function credit_newest(p_tenant bigint) returns setof credit
language plpgsql stable set enable_sort = off as $$
begin
  return query select * from credit where tenant_id = p_tenant order by version desc limit 1;
end $$;

-- ------------------------------------------------------------------------------------------- slots

-- How close slots may come to each other: closer than the limit has them, so that one that was missed can be made up.
-- The window alone keeps the limit.
create or replace function pace_us(p_cost bigint, p_limit int) returns bigint language sql immutable as
$$ select greatest(1, 900000 * p_cost / p_limit) $$;

-- The first slot at which so much more fits, after all that were given. An account's are spread over the window: what
-- is given in haste leaves a hole behind it, in this window and in each one after it, in which nothing may leave. What
-- was missed lately is made up little by little, a tenth of it at each slot, and what was not used before not at all.
create or replace function rate_earliest(r rate, p_cost int, p_limit int) returns bigint language plpgsql as $$
declare s bigint := greatest(r.closed_until, r.last); x bigint; frees bigint := 0; spread bigint; missed bigint;
begin
  x := coalesce(r.cum[array_length(r.cum, 1)], r.base) + least(p_cost, p_limit) - p_limit;
  if x > r.base then frees := r.ts[width_bucket(x - 1, r.cum) + 1] + window_us(); end if;
  if r.scope in (1, 2) then
    spread := window_us() * r.last_cost / p_limit;
    missed := greatest(0, r.last + spread - frees);
    if missed > greatest(window_us() / 10, 3 * spread / 2) then missed := 0; end if;
    s := greatest(s, r.last + spread - missed / 10);
  end if;
  return greatest(s, frees);
end $$;
