-- oldest code: 3
-- Rows that every claim changes are found in one step, however many of their old versions a long snapshot keeps.

-- While a snapshot is held, vacuum clears nothing, and an index leads to every version that a key has had. With the
-- version in it, read from its end, the newest comes first; enable_sort is off because to the planner, who counts one
-- row a key, reading all versions and sorting them costs the same. No two rows of a key are written side by side: a
-- limiter row is locked before it is written, and so is a tenant's credit; a share and a lane's turn are written under
-- the limiter row of their account.
alter table rate add column version bigint not null default 0, drop constraint rate_pkey,
  add primary key (scope, id, version);
alter table share add column version bigint not null default 0, drop constraint share_pkey,
  add primary key (account_id, tenant_id, version);
-- What each grant writes of a lane: how much it had, and before which of its batches all were taken. Unlogged: lost means
-- equal again, and a look from the start. A lane's own row has where to look once more, by who woke it; its v is that of
-- code before this.
create unlogged table lane_turn (
  lane_id  bigint not null references lane on delete cascade,
  version  bigint not null default 0,
  v        float8 not null,
  cursor   bigint not null,
  primary key (lane_id, version)
) with (autovacuum_vacuum_cost_delay = 0);
alter table lane alter cursor set default 9223372036854775807;
alter table credit add column version bigint not null default 0, drop constraint credit_pkey,
  add primary key (tenant_id, version);
-- By slot, so that who looks for one to make way does not walk through all that ever were in flight.
drop index batch_in_flight;
create index batch_in_flight on batch (account_id, slot) where state in (2, 3);

-- A limiter row as it stands.
create function rate_newest(p_scope int, p_id bigint) returns setof rate
language plpgsql stable set enable_sort = off as $$
begin
  return query select * from rate where scope = p_scope and id = p_id order by version desc limit 1;
end $$;

-- The same, locked. Null: there is none.
create function rate_hold(p_scope int, p_id bigint) returns rate
language plpgsql set enable_sort = off as $$
declare r rate;
begin
  select * into r from rate where scope = p_scope and id = p_id order by version desc limit 1 for no key update;
  return r;
end $$;

-- Writes what was held.
create or replace function rate_keep(r rate) returns void language plpgsql set enable_sort = off as $$
begin
  update rate set ts = r.ts, cum = r.cum, base = r.base, last = r.last, last_cost = r.last_cost, v = r.v,
                  singles = r.singles, closed_until = r.closed_until, version = rate.version + 1
   where scope = r.scope and id = r.id
     and version = (select x.version from rate x where x.scope = r.scope and x.id = r.id order by x.version desc limit 1);
end $$;

-- Locks one limiter row and drops what has left the window. State lost, first use or a clock that went back: closed
-- until every slot that anybody may still hold, at most two horizons ahead, is out of the window.
create or replace function rate_lock(p_scope int, p_id bigint, p_horizon bigint) returns rate language plpgsql as $$
declare r rate; now_ bigint; k int;
begin
  loop
    r := rate_hold(p_scope, p_id);
    exit when r.id is not null;
    -- Of two who do this at once the second may add a row behind the newest, which nobody reads.
    insert into rate (scope, id, closed_until) values (p_scope, p_id, clock_us() + window_us() + 2 * p_horizon)
    on conflict do nothing;
    -- What the fair order knew is lost as well: all lanes are equal again.
    if found and p_scope = 1 then delete from lane_turn t using lane l where l.id = t.lane_id and l.account_id = p_id; end if;
  end loop;
  now_ := clock_us();
  if r.last > now_ + 2 * p_horizon + 1000000 or r.closed_until > now_ + 2 * window_us() then
    r.ts := '{}'; r.cum := '{}'; r.base := 0; r.last := now_; r.last_cost := 0;
    r.closed_until := now_ + window_us() + 2 * p_horizon;
    perform rate_keep(r);
    if p_scope = 1 then
      update lane set not_before = 0 where account_id = p_id and not_before > now_;
      -- What was to wait for a time that is an hour ahead by now, say.
      update traffic_account set blocked_until = null where id = p_id and wait_until(blocked_until, now_) = 0;
      update batch set not_before = clock_timestamp()
       where id in (select b.id from lane l join batch b on b.lane_id = l.id and b.state = 1
                     where l.account_id = p_id and not l.idle and b.not_before > clock_timestamp()
                       for no key update of b skip locked);
    end if;
  end if;
  k := width_bucket(now_ - window_us(), r.ts);
  if k > 0 then r.base := r.cum[k]; r.ts := r.ts[k + 1:]; r.cum := r.cum[k + 1:]; end if;
  return r;
end $$;

-- The logs that a grant stands in, locked in the order of claims, without those that there are not.
create function rates_of(p_account bigint, p_tenant bigint) returns setof rate language plpgsql as $$
declare r rate;
begin
  for r in select h.* from (values (1, p_account), (0, 0), (2, p_account), (3, p_tenant), (4, p_tenant)) as w(scope, id),
                           lateral rate_hold(w.scope, w.id) h
  loop
    if r.id is not null then return next r; end if;
  end loop;
end $$;

-- A grant that was not used: taken out of every log that it stands in. One that has left the window stands in none.
-- p_n: what it took of the limits in messages or segments.
create or replace function give_back(p_account bigint, p_tenant bigint, p_slot bigint, p_n int) returns void
language plpgsql as $$
declare r rate; i int; c int;
begin
  if p_slot is null then return; end if;
  for r in select * from rates_of(p_account, p_tenant) loop
    continue when p_slot <= clock_us() - window_us();
    i := width_bucket(p_slot - 1, r.ts) + 1;
    continue when i > coalesce(array_length(r.ts, 1), 0);
    c := case when r.scope in (2, 4) then p_n else 1 end;
    for j in i .. array_length(r.ts, 1) loop r.cum[j] := r.cum[j] - c; end loop;
    perform rate_keep(r);
  end loop;
end $$;

-- A POST that may have arrived later than its slot and the guard allow: it is counted as if it had left at p_until,
-- by which time it had arrived, even if its slot has left the window.
create or replace function arrived_late(p_account bigint, p_tenant bigint, p_slot bigint, p_n int, p_until bigint)
returns void language plpgsql as $$
declare r rate;
begin
  perform give_back(p_account, p_tenant, p_slot, p_n);
  for r in select * from rates_of(p_account, p_tenant) loop
    perform rate_keep(rate_take(r, p_until, case when r.scope in (2, 4) then p_n else 1 end));
  end loop;
end $$;

-- One request of an account's limit for something that is not a batch (a GET): a fifth of the limit while there is
-- anything to send, else all of it. It may look two horizons ahead, or batches would always be there before it.
-- Null: come back later.
create or replace function grant_request(p_account bigint, p_horizon bigint, p_global int)
returns table (slot bigint, now_us bigint, back_us bigint) language plpgsql as $$
declare a rate; g rate; q rate; acc traffic_account; s bigint; now_ bigint; rps int; due bigint;
begin
  a := rate_lock(1, p_account, p_horizon);
  select * into acc from traffic_account where id = p_account;
  if p_global is not null then g := rate_lock(0, 0, p_horizon); end if;
  now_ := clock_us();
  rps := limit_now(acc.requests_per_second, acc.ceiling, acc.ceiling_at);
  s := greatest(now_, wait_until(acc.blocked_until, now_), rate_earliest(a, 1, rps), a.last + pace_us(a.last_cost, rps));
  if p_global is not null then s := greatest(s, rate_earliest(g, 1, p_global)); end if;
  q := rate_hold(5, p_account);
  if exists (select from lane where account_id = p_account and not idle and not paused and not closed
                                and not_before <= now_ + p_horizon) then
    -- The account's next slot or none: one further ahead would leave those before it to nobody.
    if q.last <= now_ + 2 * p_horizon then due := q.last + 5000000 / rps; end if;
    if due > s + pace_us(1, rps) then return query select null::bigint, now_, now_ + due - s; return; end if;
  end if;
  if s > now_ + 2 * p_horizon then return query select null::bigint, now_, s - 2 * p_horizon; return; end if;
  perform rate_keep(rate_take(a, s, 1));
  if p_global is not null then perform rate_keep(rate_take(g, s, 1)); end if;
  if s > due + pace_us(1, rps) then due := s; end if;    -- a fifth in the long run, whichever slots there are
  if q.id is null then
    insert into rate (scope, id, last, closed_until) values (5, p_account, coalesce(due, s), 0);
  else
    q.last := coalesce(due, s);
    perform rate_keep(q);
  end if;
  return query select s, now_, null::bigint;
end $$;

-- ------------------------------------------------------------------------------------------- credits

-- Every movement of money: the tenant's state and its ledger in one. False: a hold for which too little is available.
create or replace function move_credits(p_tenant bigint, p_kind text, p_amount bigint, p_campaign bigint, p_batch bigint,
                                        p_reason text) returns boolean language plpgsql set enable_sort = off as $$
declare c credit;
begin
  if p_amount = 0 then return true; end if;
  select * into c from credit where tenant_id = p_tenant order by version desc limit 1 for no key update;
  update credit
     set granted  = granted  + case when p_kind = 'grant' then p_amount else 0 end,
         spent    = spent    + case when p_kind = 'spend' then p_amount else 0 end,
         reserved = reserved + case p_kind when 'hold' then p_amount when 'grant' then 0 else -p_amount end,
         version  = version + 1
   where tenant_id = p_tenant and version = c.version
     and (p_kind <> 'hold' or granted - spent - reserved >= p_amount)
  returning * into c;
  if not found then return false; end if;
  insert into ledger (tenant_id, kind, amount, campaign_id, batch_id, reason, balance_after, reserved_after)
  values (p_tenant, p_kind, p_amount, nullif(p_campaign, 0), p_batch, p_reason, c.granted - c.spent, c.reserved);
  return true;
end $$;

-- ------------------------------------------------------------------------------------------- shares and turns

create function share_newest(p_account bigint, p_tenant bigint) returns setof share language sql stable as $$
  select * from share where account_id = p_account and tenant_id = p_tenant order by version desc limit 1
$$;

-- Under the lock of the account's limiter row.
create function share_keep(p_account bigint, p_tenant bigint, p_v float8, p_lane_v float8) returns void
language plpgsql set enable_sort = off as $$
begin
  update share set v = p_v, lane_v = p_lane_v, version = share.version + 1
   where account_id = p_account and tenant_id = p_tenant
     and version = (select x.version from share x where x.account_id = p_account and x.tenant_id = p_tenant
                     order by x.version desc limit 1);
  if not found then
    insert into share (account_id, tenant_id, v, lane_v) values (p_account, p_tenant, p_v, p_lane_v);
  end if;
end $$;

create function turn_newest(p_lane bigint) returns setof lane_turn language sql stable as $$
  select * from lane_turn where lane_id = p_lane order by version desc limit 1
$$;

-- Likewise. p_cursor: null leaves it.
create function turn_keep(p_lane bigint, p_v float8, p_cursor bigint) returns void
language plpgsql set enable_sort = off as $$
begin
  update lane_turn set v = p_v, cursor = coalesce(p_cursor, cursor), version = lane_turn.version + 1
   where lane_id = p_lane
     and version = (select x.version from lane_turn x where x.lane_id = p_lane order by x.version desc limit 1);
  if not found then insert into lane_turn (lane_id, v, cursor) values (p_lane, p_v, coalesce(p_cursor, 0)); end if;
end $$;

-- ------------------------------------------------------------------------------------------- claim

-- The first slot from p_from and before p_until that a campaign's batch has been given and has written no intent for:
-- the batch goes back to its place, and what its lane and its tenant paid is theirs again. It had taken at least p_cost
-- of the account's limits; of another tenant's only where p_fits. Null: there is none. Whoever had it learns that from
-- its intent, which finds it lost. Single messages get no more than half of what is on its way like this: with more of
-- them, campaigns keep the slots that they are given.
create or replace function make_way(acc traffic_account, p_tenant bigint, p_fits boolean, p_cost int, p_rps int,
                                    p_until bigint, p_from bigint)
returns bigint language plpgsql set enable_sort = off as $$
declare b batch; paid float8;
begin
  select x.* into b from batch x join lane l on l.id = x.lane_id
   where x.account_id = acc.id and x.state = 2 and x.campaign_id <> 0 and x.slot >= p_from and x.slot < p_until
     and x.cost >= p_cost and (p_fits or x.tenant_id = p_tenant) and not l.closed
     and (select count(*) < 2 * count(*) filter (where y.campaign_id <> 0) from batch y
           where y.account_id = acc.id and y.state in (2, 3))
   order by x.slot limit 1 for no key update of x skip locked;
  if not found then return null; end if;
  perform withdraw(b.id, b.epoch, 'made way for a single message');
  paid := greatest(1.0 / p_rps, b.cost::float8 / acc.messages_per_second);
  perform turn_keep(b.lane_id, t.v - paid, null) from turn_newest(b.lane_id) t;
  perform share_keep(acc.id, b.tenant_id, sh.v - paid / (select weight from tenant where id = b.tenant_id), sh.lane_v)
     from share_newest(acc.id, b.tenant_id) sh;
  return b.slot;
end $$;

-- One round trip: the fair lane, a slot under every limit, the lease of up to p_want batches. The limiter row of the
-- account is the one lock that serialises its claims. Returns a row a batch (cost: what it took of the limits in
-- messages or segments); or one row without a batch that says what it waits for and when (microseconds) to come back
-- (null: at the next wake). Start-time fair queueing (Goyal, Vin, Cheng 1996) on the tenant and, within it, on the
-- lane; single messages come first, but of ten grants in a row one is a campaign's; and where all slots of the horizon
-- are given, a campaign's batch makes way for one. p_single_lead: no slot of a single message is earlier than this from
-- now (null: p_lead).
create or replace function claim(p_account bigint, p_replica bigint, p_want int, p_lead bigint, p_horizon bigint, p_global int,
                      p_priority_only boolean, p_single_lead bigint default null)
returns table (batch_id bigint, epoch int, campaign_id bigint, tenant_id bigint, n int, slot bigint, now_us bigint,
               waits_for text, cost int)
language plpgsql set plan_cache_mode = force_generic_plan set enable_sort = off as $$
#variable_conflict use_column
declare
  a rate; am rate; g rate; t rate; tm rate; acc traffic_account; b batch; l record;
  now_ bigint; s bigint; st bigint; back bigint; due timestamptz; why text; paid float8; start_ float8;
  got int := 0; most int; whole int; hit boolean; taken boolean := false; rps int; free int; by_segments boolean;
  soonest bigint; way bigint; fits boolean;
begin
  a := rate_lock(1, p_account, p_horizon);
  select * into acc from traffic_account where id = p_account;
  if not found or acc.paused_reason is not null then
    return query select null::bigint, 0, 0::bigint, 0::bigint, 0, null::bigint, clock_us(), 'account_paused', 0; return;
  end if;
  if not exists (select from replica where id = p_replica and gone_at is null) then
    return query select null::bigint, 0, 0::bigint, 0::bigint, 0, null::bigint, clock_us(), 'replica_gone', 0; return;
  end if;
  if p_global is not null then g := rate_lock(0, 0, p_horizon); end if;
  if acc.messages_per_second is not null then am := rate_lock(2, p_account, p_horizon); end if;
  now_ := clock_us();                                   -- after the locks, never now()
  rps := limit_now(acc.requests_per_second, acc.ceiling, acc.ceiling_at);
  by_segments := acc.limit_unit = 'segments';
  if acc.max_in_flight is not null then                 -- of several places one is kept for single messages
    select acc.max_in_flight - count(*) into free from batch where account_id = p_account and state in (2, 3);
    if free <= (acc.max_in_flight > 1)::int then
      if not p_priority_only or free <= 0 then back := now_ + 50000; why := 'in_flight'; end if;
      p_priority_only := true;
    elsif not p_priority_only then
      free := free - (acc.max_in_flight > 1)::int;
    end if;
    p_want := least(p_want, free);
  end if;
  while got < p_want and not taken loop
    hit := false;
    for l in
      select ln.id, ln.tenant_id, ln.class, coalesce(tu.v, 0) as v, ln.cursor as woken_from,
             least(coalesce(tu.cursor, 0), ln.cursor) as cursor, ln.wakes, te.weight, te.requests_per_second as rps,
             te.messages_per_second as mps, coalesce(sh.v, 0) as share_v, coalesce(sh.lane_v, 0) as lane_v,
             case when a.singles >= 9 then ln.class = 1
                  else ln.class = 0 and coalesce(sh.v, 0) <= a.v + 1.0 / te.weight end as before_all
        from lane ln
        join tenant te on te.id = ln.tenant_id
        left join lateral share_newest(ln.account_id, ln.tenant_id) sh on true
        left join lateral turn_newest(ln.id) tu on true
       where ln.account_id = p_account and not ln.idle and not ln.paused and not ln.closed
         and ln.not_before <= now_ + p_horizon and (ln.class = 0 or not p_priority_only)
       order by before_all desc, greatest(coalesce(sh.v, 0), a.v), coalesce(sh.v, 0),
                greatest(coalesce(tu.v, 0), coalesce(sh.lane_v, 0)), ln.id
    loop
      select * into b from batch
       where lane_id = l.id and state = 1 and not_before <= clock_timestamp()
       order by not_before limit 1 for no key update skip locked;
      if not found then
        select * into b from batch
         where lane_id = l.id and state = 0 and first_id >= l.cursor
         order by first_id limit 1 for no key update skip locked;
      end if;
      if not found then                                 -- unless somebody woke it since we looked
        select min(not_before) into due from batch where lane_id = l.id and state = 1;
        update lane set idle = due is null, not_before = coalesce(to_us(due) + p_horizon, 0)
         where id = l.id and wakes = l.wakes;
        if not found then back := now_; end if;
        continue;
      end if;
      whole := case when by_segments then b.segments else b.n end;
      soonest := greatest(now_ + case l.class when 0 then coalesce(p_single_lead, p_lead) else p_lead end,
                          wait_until(acc.blocked_until, now_));
      s := greatest(soonest, rate_earliest(a, 1, rps), a.last + pace_us(a.last_cost, rps));
      if p_global is not null then s := greatest(s, rate_earliest(g, 1, p_global)); end if;
      if acc.messages_per_second is not null then
        s := greatest(s, am.last + pace_us(am.last_cost, acc.messages_per_second),
                      rate_earliest(am, least(whole, least_piece(acc.messages_per_second, acc.limit_unit)),
                                    acc.messages_per_second));
      end if;
      way := null;
      if l.before_all and l.class = 0 and s > soonest + 5000 then
        t := rate_lock(3, l.tenant_id, p_horizon);
        fits := rate_fits(t, 1, l.rps);
        if l.mps is not null then
          tm := rate_lock(4, l.tenant_id, p_horizon);
          fits := fits and rate_fits(tm, whole, l.mps);
        end if;
        perform rate_keep(a);
        if p_global is not null then perform rate_keep(g); end if;
        if acc.messages_per_second is not null then perform rate_keep(am); end if;
        way := make_way(acc, l.tenant_id, fits, whole, rps, s - 5000,
                        greatest(soonest, a.closed_until, g.closed_until, am.closed_until, t.closed_until,
                                 tm.closed_until));
        if way is not null then                         -- it stands in all these logs no more
          a := rate_lock(1, p_account, p_horizon);
          if p_global is not null then g := rate_lock(0, 0, p_horizon); end if;
          if acc.messages_per_second is not null then am := rate_lock(2, p_account, p_horizon); end if;
          l.share_v := coalesce((select sh.v from share_newest(p_account, l.tenant_id) sh), 0);
          s := way;
        end if;
      end if;
      if s > now_ + p_horizon then
        taken := true; back := s - p_horizon; why := 'account_limit';
        if wait_until(acc.blocked_until, now_) > now_ then why := 'account_throttled'; end if;
        exit;
      end if;
      t := rate_lock(3, l.tenant_id, p_horizon);
      st := case when way is null then greatest(s, rate_earliest(t, 1, l.rps)) else s end;
      if l.mps is not null then
        tm := rate_lock(4, l.tenant_id, p_horizon);
        if way is null then st := greatest(st, rate_earliest(tm, least(whole, least_piece(l.mps, acc.limit_unit)), l.mps)); end if;
      end if;
      if st > s then                                    -- stepped over: the account's slot is not spent on it
        update lane set not_before = st where id = l.id;
        back := least(back, st - p_lead); why := 'tenant_limit';
        continue;
      end if;
      -- As much of it as every limit has room for: the rest is a batch of its own, in place.
      most := whole;                                    -- what was made way for fits
      if way is null and acc.messages_per_second is not null then most := least(most, rate_room(am, s, acc.messages_per_second)); end if;
      if way is null and l.mps is not null then most := least(most, rate_room(tm, s, l.mps)); end if;
      if most < whole or b.n > acc.largest_request then
        perform cut_batch(b.id, least(acc.largest_request,
                                      case when most = whole then b.n when by_segments then messages_within(b, most)
                                           else most end));
        select * into b from batch where id = b.id;
        whole := case when by_segments then b.segments else b.n end;
      end if;
      a := rate_take(a, s, 1);
      a.singles := case when l.class = 0 then least(a.singles + 1, 9) else 0 end;
      if p_global is not null then g := rate_take(g, s, 1); end if;
      if acc.messages_per_second is not null then am := rate_take(am, s, whole); end if;
      perform rate_keep(rate_take(t, s, 1));
      if l.mps is not null then perform rate_keep(rate_take(tm, s, whole)); end if;
      -- Paid alike in requests and messages; a lane that was idle or stepped over brings no credit along.
      paid := greatest(1.0 / rps, whole::float8 / acc.messages_per_second);
      start_ := greatest(l.v, l.lane_v);
      perform share_keep(p_account, l.tenant_id, greatest(a.v, l.share_v) + paid / l.weight, start_);
      if not l.before_all then a.v := greatest(a.v, l.share_v); end if;   -- who goes before its turn moves no clock
      perform turn_keep(l.id, start_ + paid, case b.state when 0 then b.first_id + 1 end);
      if b.state = 0 and l.woken_from < 9223372036854775807 then      -- from here on the turn knows, unless woken again
        update lane set cursor = 9223372036854775807 where id = l.id and wakes = l.wakes;
      end if;
      update batch set state = 2, owner = p_replica, epoch = epoch + 1, slot = s, cost = whole where id = b.id;
      got := got + 1; hit := true;
      batch_id := b.id; epoch := b.epoch + 1; campaign_id := b.campaign_id; tenant_id := l.tenant_id; n := b.n;
      slot := s; now_us := now_; waits_for := null; cost := whole;
      return next;
      exit;
    end loop;
    exit when not hit;
  end loop;
  if got > 0 then
    perform rate_keep(a);
    if p_global is not null then perform rate_keep(g); end if;
    if acc.messages_per_second is not null then perform rate_keep(am); end if;
    return;
  end if;
  if back is null then                                  -- what sleeps is looked at a horizon before its not_before
    select min(not_before) - p_horizon into back from lane
     where account_id = p_account and not idle and not paused and not closed and not_before > 0
       and (class = 0 or not p_priority_only);
    if back is not null then why := 'retry'; end if;
  end if;
  return query select null::bigint, 0, 0::bigint, 0::bigint, 0,
                      case when back is not null then greatest(back, now_ + 1000) end, now_, coalesce(why, 'work'), 0;
end $$;
