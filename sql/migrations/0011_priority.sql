-- oldest code: 3
-- A single message does not wait until the slots that a campaign has already are gone.

-- Adds a grant to the log; grants within 8 ms share an entry, at the later of their times. One that is earlier than the
-- latest goes between the others.
create or replace function rate_take(r rate, p_slot bigint, p_cost int) returns rate language plpgsql as $$
declare n int := coalesce(array_length(r.ts, 1), 0); k int := width_bucket(p_slot, r.ts);
begin
  if k < n and r.ts[k + 1] / 8000 = p_slot / 8000 then
    k := k + 1;
  elsif k > 0 and r.ts[k] / 8000 = p_slot / 8000 then
    r.ts[k] := p_slot;
  elsif k = n then
    r.cum := r.cum || case when k > 0 then r.cum[k] else r.base end; r.ts := r.ts || p_slot;
    k := k + 1;
  else
    r.cum := r.cum[:k] || case when k > 0 then r.cum[k] else r.base end || r.cum[k + 1:];
    r.ts := r.ts[:k] || p_slot || r.ts[k + 1:];
    k := k + 1;
  end if;
  for j in k .. array_length(r.ts, 1) loop r.cum[j] := r.cum[j] + p_cost; end loop;
  if p_slot >= r.last then r.last := p_slot; r.last_cost := p_cost; end if;
  return r;
end $$;

-- Whether so much more fits at any of its times: no window of a second holds more than the whole log.
create function rate_fits(r rate, p_cost int, p_limit int) returns boolean language sql immutable as
$$ select coalesce(r.cum[array_length(r.cum, 1)], r.base) - r.base + p_cost <= p_limit $$;

-- The first slot from p_from and before p_until that a campaign's batch has been given and has written no intent for:
-- the batch goes back to its place, and what its lane and its tenant paid is theirs again. It had taken at least p_cost
-- of the account's limits; of another tenant's only where p_fits. Null: there is none. Whoever had it learns that from
-- its intent, which finds it lost. Single messages get no more than half of what is on its way like this: with more of
-- them, campaigns keep the slots that they are given.
create function make_way(acc traffic_account, p_tenant bigint, p_fits boolean, p_cost int, p_rps int, p_until bigint,
                         p_from bigint) returns bigint language plpgsql as $$
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
  update lane set v = v - paid where id = b.lane_id;
  update share set v = v - paid / (select weight from tenant where id = b.tenant_id)
   where account_id = acc.id and tenant_id = b.tenant_id;
  return b.slot;
end $$;

-- One round trip: the fair lane, a slot under every limit, the lease of up to p_want batches. The limiter row of the
-- account is the one lock that serialises its claims. Returns a row a batch (cost: what it took of the limits in
-- messages or segments); or one row without a batch that says what it waits for and when (microseconds) to come back
-- (null: at the next wake). Start-time fair queueing (Goyal, Vin, Cheng 1996) on the tenant and, within it, on the
-- lane; single messages come first, but of ten grants in a row one is a campaign's; and where all slots of the horizon
-- are given, a campaign's batch makes way for one. p_single_lead: no slot of a single message is earlier than this from
-- now (null: p_lead).
drop function claim(bigint, bigint, int, bigint, bigint, int, boolean);
create function claim(p_account bigint, p_replica bigint, p_want int, p_lead bigint, p_horizon bigint, p_global int,
                      p_priority_only boolean, p_single_lead bigint default null)
returns table (batch_id bigint, epoch int, campaign_id bigint, tenant_id bigint, n int, slot bigint, now_us bigint,
               waits_for text, cost int)
language plpgsql set plan_cache_mode = force_generic_plan as $$
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
          l.share_v := coalesce((select sh.v from share sh
                                  where sh.account_id = p_account and sh.tenant_id = l.tenant_id), 0);
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
-- may leave now; the old one is given back then. For a single message a campaign's batch makes way, as in `claim`.
create or replace function retake_slot(p_batch bigint, p_epoch int, p_lead bigint, p_horizon bigint, p_global int) returns bigint
language plpgsql as $$
declare
  b batch; acc traffic_account; te tenant; a rate; r rate; t rate; tm rate; s bigint; way bigint; now_ bigint; rps int;
  due int; shut bigint;
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
  shut := a.closed_until;
  if p_global is not null then
    r := rate_lock(0, 0, p_horizon);
    s := greatest(s, rate_earliest(r, 1, p_global));
    shut := greatest(shut, r.closed_until);
  end if;
  if acc.messages_per_second is not null then
    r := rate_lock(2, b.account_id, p_horizon);
    s := greatest(s, rate_earliest(r, due, acc.messages_per_second),
                  r.last + pace_us(r.last_cost, acc.messages_per_second));
    shut := greatest(shut, r.closed_until);
  end if;
  t := rate_lock(3, b.tenant_id, p_horizon);
  s := greatest(s, rate_earliest(t, 1, te.requests_per_second));
  if te.messages_per_second is not null then
    tm := rate_lock(4, b.tenant_id, p_horizon);
    s := greatest(s, rate_earliest(tm, due, te.messages_per_second));
  end if;
  if b.campaign_id = 0 and s > now_ + p_lead + 5000 then
    way := make_way(acc, b.tenant_id,
                    rate_fits(t, 1, te.requests_per_second)
                    and (te.messages_per_second is null or rate_fits(tm, due, te.messages_per_second)),
                    due, rps, s - 5000, greatest(now_ + p_lead, shut, t.closed_until, tm.closed_until));
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
