-- oldest code: 3
-- Limits and fairness, second part: a ceiling learned from Mitto's refusals, limits in segments, room in flight and a
-- floor for campaigns; what was granted is remembered, so that exactly that is given back.

alter table traffic_account
  add column limit_unit text not null default 'messages' check (limit_unit in ('messages', 'segments')),
  add column ceiling float8 check (ceiling >= 1),
  add column ceiling_at timestamptz;
-- What the batch's grant took of the limits in messages or segments.
alter table batch add column cost int;
create index batch_in_flight on batch (account_id) where state in (2, 3);
-- Scope 5 paces look-ups. singles: how many single messages were granted since the last of a campaign.
alter table rate add column singles int not null default 0;

-- J, in microseconds: how much later than its slot a request may arrive and still be inside the window.
create function guard_us() returns bigint language sql immutable as $$ select 30000::bigint $$;

create function window_us() returns bigint language sql immutable as $$ select 1000000 + guard_us() $$;

-- How far apart slots are: a little less than the limit, so that one that was missed can be made up. The window alone
-- keeps the limit.
create function pace_us(p_cost bigint, p_limit int) returns bigint language sql immutable as
$$ select greatest(1, 950000 * p_cost / p_limit) $$;

-- The requests per second that hold now: a ceiling climbs by 3 % of the limit a second, until it is gone.
create function limit_now(p_limit int, p_ceiling float8, p_at timestamptz) returns int language sql volatile as $$
  select case when p_ceiling is null then p_limit
              else greatest(1, least(p_limit, floor(p_ceiling + 0.03 * p_limit
                                                    * abs(extract(epoch from from_us(clock_us()) - p_at)))))::int end
$$;

-- The ceiling as it is now, for people: null where there is none.
create function ceiling_now(a traffic_account) returns int language sql volatile as $$
  select nullif(limit_now(a.requests_per_second, a.ceiling, a.ceiling_at), a.requests_per_second)
$$;

-- A time of the database's clock until which to wait; what is further ahead than Mitto may ask for (10 minutes) was
-- said before the clock stepped back, and is over.
create function wait_until(p_at timestamptz, p_now bigint) returns bigint language sql immutable as
$$ select case when to_us(p_at) < p_now + 660000000 then to_us(p_at) else 0 end $$;

-- Mitto said: too many. All replicas wait. The ceiling goes down once for all requests that were granted before we
-- stopped for it: their answers are one event. Returns whether this was a new one.
create function throttle_account(p_account bigint, p_seconds float8, p_slot bigint) returns boolean
language plpgsql as $$
declare now_ timestamptz := from_us(clock_us());
begin
  update traffic_account
     set blocked_until = greatest(case when wait_until(blocked_until, to_us(now_)) > 0 then blocked_until
                                       else '-infinity' end, now_ + make_interval(secs => p_seconds))
   where id = p_account;
  update traffic_account
     set ceiling = greatest(1, 0.8 * limit_now(requests_per_second, ceiling, ceiling_at)), ceiling_at = now_
   where id = p_account
     and (ceiling_at is null or ceiling_at > now_ or from_us(p_slot) > ceiling_at + interval '0.15 seconds');
  return found;
end $$;

-- Locks one limiter row and drops what has left the window. State lost, first use or a clock that went back: closed
-- until every slot that anybody may still hold, at most two horizons ahead, is out of the window.
create or replace function rate_lock(p_scope int, p_id bigint, p_horizon bigint) returns rate language plpgsql as $$
declare r rate; now_ bigint; k int;
begin
  loop
    select * into r from rate where scope = p_scope and id = p_id for no key update;
    exit when found;
    insert into rate (scope, id, closed_until) values (p_scope, p_id, clock_us() + window_us() + 2 * p_horizon)
    on conflict do nothing;
    -- What the fair order knew is lost as well: all lanes are equal again.
    if found and p_scope = 1 then update lane set v = 0 where account_id = p_id and v > 0; end if;
  end loop;
  now_ := clock_us();
  if r.last > now_ + 2 * p_horizon + 1000000 or r.closed_until > now_ + 2 * window_us() then
    r.ts := '{}'; r.cum := '{}'; r.base := 0; r.last := now_; r.last_cost := 0;
    r.closed_until := now_ + window_us() + 2 * p_horizon;
    update rate set ts = '{}', cum = '{}', base = 0, last = now_, last_cost = 0, closed_until = r.closed_until
     where scope = p_scope and id = p_id;
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

-- The earliest slot at which `cost` more fits: enough of the log must have left the window before it.
-- width_bucket over a sorted array is a binary search. What is more than the limit alone waits for an empty window.
create or replace function rate_earliest(r rate, p_cost int, p_limit int) returns bigint language plpgsql as $$
declare s bigint := greatest(r.closed_until, r.last); x bigint;
begin
  x := coalesce(r.cum[array_length(r.cum, 1)], r.base) + least(p_cost, p_limit) - p_limit;
  if x > r.base then s := greatest(s, r.ts[width_bucket(x - 1, r.cum) + 1] + window_us()); end if;
  return s;
end $$;

-- How much fits at a slot.
create function rate_room(r rate, p_slot bigint, p_limit int) returns int language plpgsql as $$
declare k int := width_bucket(p_slot - window_us(), r.ts);
begin
  return p_limit - coalesce(r.cum[array_length(r.cum, 1)], r.base) + case when k > 0 then r.cum[k] else r.base end;
end $$;

create or replace function rate_keep(r rate) returns void language sql as $$
  update rate set ts = r.ts, cum = r.cum, base = r.base, last = r.last, last_cost = r.last_cost, v = r.v,
                  singles = r.singles
   where scope = r.scope and id = r.id
$$;

-- A grant that was not used: taken out of every log that it stands in. One that has left the window stands in none.
-- p_n: what it took of the limits in messages or segments.
create or replace function give_back(p_account bigint, p_tenant bigint, p_slot bigint, p_n int) returns void
language plpgsql as $$
declare r rate; i int; c int;
begin
  if p_slot is null then return; end if;
  for r in select * from rate
            where (scope = 0 and id = 0) or (scope in (1, 2) and id = p_account) or (scope in (3, 4) and id = p_tenant)
            order by case scope when 1 then 0 when 0 then 1 else scope end for no key update
  loop
    continue when p_slot <= clock_us() - window_us();
    i := width_bucket(p_slot - 1, r.ts) + 1;
    continue when i > coalesce(array_length(r.ts, 1), 0);
    c := case when r.scope in (2, 4) then p_n else 1 end;
    for j in i .. array_length(r.ts, 1) loop r.cum[j] := r.cum[j] - c; end loop;
    update rate set cum = r.cum where scope = r.scope and id = r.id;
  end loop;
end $$;

-- One request of an account's limit for something that is not a batch (a GET): a fifth of the limit while there is
-- anything to send, else all of it. It may look two horizons ahead, or batches would always be there before it.
-- Null: come back later.
create or replace function grant_request(p_account bigint, p_horizon bigint, p_global int)
returns table (slot bigint, now_us bigint, back_us bigint) language plpgsql as $$
declare a rate; g rate; acc traffic_account; s bigint; now_ bigint; rps int; last_ bigint; due bigint;
begin
  a := rate_lock(1, p_account, p_horizon);
  select * into acc from traffic_account where id = p_account;
  if p_global is not null then g := rate_lock(0, 0, p_horizon); end if;
  now_ := clock_us();
  rps := limit_now(acc.requests_per_second, acc.ceiling, acc.ceiling_at);
  s := greatest(now_, wait_until(acc.blocked_until, now_), rate_earliest(a, 1, rps), a.last + pace_us(a.last_cost, rps));
  if p_global is not null then s := greatest(s, rate_earliest(g, 1, p_global)); end if;
  if exists (select from lane where account_id = p_account and not idle and not paused and not closed
                                and not_before <= now_ + p_horizon) then
    select r.last into last_ from rate r where r.scope = 5 and r.id = p_account;
    -- The account's next slot or none: one further ahead would leave those before it to nobody.
    if last_ <= now_ + 2 * p_horizon then due := last_ + 5000000 / rps; end if;
    if due > s + pace_us(1, rps) then return query select null::bigint, now_, now_ + due - s; return; end if;
  end if;
  if s > now_ + 2 * p_horizon then return query select null::bigint, now_, s - 2 * p_horizon; return; end if;
  perform rate_keep(rate_take(a, s, 1));
  if p_global is not null then perform rate_keep(rate_take(g, s, 1)); end if;
  if s > due + pace_us(1, rps) then due := s; end if;    -- a fifth in the long run, whichever slots there are
  insert into rate as r (scope, id, last, closed_until) values (5, p_account, coalesce(due, s), 0)
  on conflict (scope, id) do update set last = excluded.last;
  return query select s, now_, null::bigint;
end $$;

-- ------------------------------------------------------------------------------------------- claim

-- The least that is worth a request of its own where a limit counts messages: so much of a batch leaves as soon as
-- that fits, or a batch that does not divide the limit would leave a part of it unused. Ten: the longest text.
create function least_piece(p_limit int, p_unit text) returns int language sql immutable as
$$ select greatest(ceil(p_limit / 25.0), case p_unit when 'segments' then 10 else 1 end)::int $$;

-- How many of a batch's messages, from its first on, are worth at most p_most segments; one at least.
create function messages_within(b batch, p_most int) returns int language sql stable as $$
  select greatest(1, count(*))::int
    from (select sum(m.segments) over (order by m.id) as worth from message m
           where m.campaign_id = b.campaign_id and m.id between b.first_id and b.last_id and m.state is null) m
   where m.worth <= p_most
$$;

-- One round trip: the fair lane, a slot under every limit, the lease of up to p_want batches. The limiter row of the
-- account is the one lock that serialises its claims. Returns a row a batch (cost: what it took of the limits in
-- messages or segments); or one row without a batch that says what it waits for and when (microseconds) to come back
-- (null: at the next wake). Start-time fair queueing (Goyal, Vin, Cheng 1996) on the tenant and, within it, on the
-- lane; single messages come first, but of ten grants in a row one is a campaign's.
drop function claim(bigint, bigint, int, bigint, bigint, int, boolean);
create function claim(p_account bigint, p_replica bigint, p_want int, p_lead bigint, p_horizon bigint, p_global int,
                      p_priority_only boolean)
returns table (batch_id bigint, epoch int, campaign_id bigint, tenant_id bigint, n int, slot bigint, now_us bigint,
               waits_for text, cost int)
language plpgsql set plan_cache_mode = force_generic_plan as $$
#variable_conflict use_column
declare
  a rate; am rate; g rate; t rate; tm rate; acc traffic_account; b batch; l record;
  now_ bigint; s bigint; st bigint; back bigint; due timestamptz; why text; paid float8; start_ float8;
  got int := 0; most int; whole int; hit boolean; taken boolean := false; rps int; free int; by_segments boolean;
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
      select ln.id, ln.tenant_id, ln.class, ln.v, ln.cursor, ln.wakes, te.weight, te.requests_per_second as rps,
             te.messages_per_second as mps, coalesce(sh.v, 0) as share_v, coalesce(sh.lane_v, 0) as lane_v,
             case when a.singles >= 9 then ln.class = 1
                  else ln.class = 0 and coalesce(sh.v, 0) <= a.v + 1.0 / te.weight end as before_all
        from lane ln
        join tenant te on te.id = ln.tenant_id
        left join share sh on sh.account_id = ln.account_id and sh.tenant_id = ln.tenant_id
       where ln.account_id = p_account and not ln.idle and not ln.paused and not ln.closed
         and ln.not_before <= now_ + p_horizon and (ln.class = 0 or not p_priority_only)
       order by before_all desc, greatest(coalesce(sh.v, 0), a.v), coalesce(sh.v, 0),
                greatest(ln.v, coalesce(sh.lane_v, 0)), ln.id
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
      s := greatest(now_ + p_lead, wait_until(acc.blocked_until, now_), rate_earliest(a, 1, rps),
                    a.last + pace_us(a.last_cost, rps));
      if p_global is not null then s := greatest(s, rate_earliest(g, 1, p_global)); end if;
      if acc.messages_per_second is not null then
        s := greatest(s, am.last + pace_us(am.last_cost, acc.messages_per_second),
                      rate_earliest(am, least(whole, least_piece(acc.messages_per_second, acc.limit_unit)),
                                    acc.messages_per_second));
      end if;
      if s > now_ + p_horizon then
        taken := true; back := s - p_horizon; why := 'account_limit';
        if wait_until(acc.blocked_until, now_) > now_ then why := 'account_throttled'; end if;
        exit;
      end if;
      t := rate_lock(3, l.tenant_id, p_horizon);
      st := greatest(s, rate_earliest(t, 1, l.rps));
      if l.mps is not null then
        tm := rate_lock(4, l.tenant_id, p_horizon);
        st := greatest(st, rate_earliest(tm, least(whole, least_piece(l.mps, acc.limit_unit)), l.mps));
      end if;
      if st > s then                                    -- stepped over: the account's slot is not spent on it
        update lane set not_before = st where id = l.id;
        back := least(back, st - p_lead); why := 'tenant_limit';
        continue;
      end if;
      -- As much of it as every limit has room for: the rest is a batch of its own, in place.
      most := whole;
      if acc.messages_per_second is not null then most := least(most, rate_room(am, s, acc.messages_per_second)); end if;
      if l.mps is not null then most := least(most, rate_room(tm, s, l.mps)); end if;
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
      insert into share as sh (account_id, tenant_id, v, lane_v)
      values (p_account, l.tenant_id, greatest(a.v, l.share_v) + paid / l.weight, start_)
      on conflict (account_id, tenant_id) do update set v = excluded.v, lane_v = excluded.lane_v;
      if not l.before_all then a.v := greatest(a.v, l.share_v); end if;   -- who goes before its turn moves no clock
      update lane
         set v = start_ + paid,
             cursor = case when b.state = 1 then cursor when wakes = l.wakes then b.first_id + 1
                           else least(cursor, b.first_id + 1) end
       where id = l.id;
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

-- A slot that was missed between intent and first byte, for another one in the same round trip: the grant moves, lease
-- and intent stay. Up to two horizons ahead, as others have the next slots already. Null: there is none soon, or nothing
-- may leave now; the old one is given back then.
create function retake_slot(p_batch bigint, p_epoch int, p_lead bigint, p_horizon bigint, p_global int) returns bigint
language plpgsql as $$
declare b batch; acc traffic_account; te tenant; a rate; r rate; s bigint; now_ bigint; rps int; due int;
begin
  perform set_config('synchronous_commit', 'off', true);   -- forgotten, it would take the limiter's state along
  select * into b from batch where id = p_batch and epoch = p_epoch and state = 3 for no key update;
  if not found then return null; end if;
  select * into te from tenant where id = b.tenant_id;
  due := coalesce(b.cost, b.n);
  a := rate_lock(1, b.account_id, p_horizon);
  perform give_back(b.account_id, b.tenant_id, b.slot, due);
  select * into acc from traffic_account where id = b.account_id;
  a := rate_lock(1, b.account_id, p_horizon);
  now_ := clock_us();
  rps := limit_now(acc.requests_per_second, acc.ceiling, acc.ceiling_at);
  s := greatest(now_ + p_lead, rate_earliest(a, 1, rps), a.last + pace_us(a.last_cost, rps));
  if p_global is not null then s := greatest(s, rate_earliest(rate_lock(0, 0, p_horizon), 1, p_global)); end if;
  if acc.messages_per_second is not null then
    r := rate_lock(2, b.account_id, p_horizon);
    s := greatest(s, rate_earliest(r, due, acc.messages_per_second),
                  r.last + pace_us(r.last_cost, acc.messages_per_second));
  end if;
  s := greatest(s, rate_earliest(rate_lock(3, b.tenant_id, p_horizon), 1, te.requests_per_second));
  if te.messages_per_second is not null then
    s := greatest(s, rate_earliest(rate_lock(4, b.tenant_id, p_horizon), due, te.messages_per_second));
  end if;
  if s > now_ + 2 * p_horizon or acc.paused_reason is not null or wait_until(acc.blocked_until, now_) > now_
     or (select l.paused or l.closed from lane l where l.id = b.lane_id) then
    s := null;
  else
    perform rate_keep(rate_take(a, s, 1));
    if p_global is not null then perform rate_keep(rate_take(rate_lock(0, 0, p_horizon), s, 1)); end if;
    if acc.messages_per_second is not null then perform rate_keep(rate_take(r, s, due)); end if;
    perform rate_keep(rate_take(rate_lock(3, b.tenant_id, p_horizon), s, 1));
    if te.messages_per_second is not null then
      perform rate_keep(rate_take(rate_lock(4, b.tenant_id, p_horizon), s, due));
    end if;
    update attempt set slot_at = from_us(s) where batch_id = b.id and n = b.attempt;
  end if;
  update batch set slot = s where id = b.id;
  return s;
end $$;

-- A POST that may have arrived later than its slot and the guard allow: it is counted as if it had left at p_until,
-- by which time it had arrived, even if its slot has left the window.
create or replace function arrived_late(p_account bigint, p_tenant bigint, p_slot bigint, p_n int, p_until bigint)
returns void language plpgsql as $$
declare r rate; k int; c int;
begin
  perform give_back(p_account, p_tenant, p_slot, p_n);
  for r in select * from rate
            where (scope = 0 and id = 0) or (scope in (1, 2) and id = p_account) or (scope in (3, 4) and id = p_tenant)
            order by case scope when 1 then 0 when 0 then 1 else scope end for no key update
  loop
    c := case when r.scope in (2, 4) then p_n else 1 end;
    k := width_bucket(p_until, r.ts);
    for j in k + 1 .. coalesce(array_length(r.ts, 1), 0) loop r.cum[j] := r.cum[j] + c; end loop;
    if k > 0 and r.ts[k] / 8000 = p_until / 8000 then
      r.ts[k] := p_until; r.cum[k] := r.cum[k] + c;
    else
      r.cum := r.cum[:k] || (case when k > 0 then r.cum[k] else r.base end + c) || r.cum[k + 1:];
      r.ts := r.ts[:k] || p_until || r.ts[k + 1:];
    end if;
    update rate set ts = r.ts, cum = r.cum, last = greatest(last, p_until) where scope = r.scope and id = r.id;
  end loop;
end $$;
