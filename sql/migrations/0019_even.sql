-- oldest code: 3
-- The campaigns of a tenant that sends single messages use its limit evenly, so that these find room in it at any time.

comment on column rate.v is 'of an account the clock of the fair order; of a tenant the slot of its last single message';

-- When the next would be due, had all in the log come evenly: no sooner than any of them and a limit's distance for
-- each since. (Microseconds; 0: nothing is in it.)
create function rate_even(r rate, p_limit int) returns bigint language plpgsql immutable as $$
declare n int := coalesce(array_length(r.ts, 1), 0); due bigint := 0; before bigint := r.base;
begin
  for j in 1 .. n loop
    due := greatest(due, r.ts[j] + window_us() * (r.cum[n] - before) / p_limit);
    before := r.cum[j];
  end loop;
  return due;
end $$;

-- One round trip: the fair lane, a slot under every limit, the lease of up to p_want batches. The limiter row of the
-- account is the one lock that serialises its claims. Returns a row a batch (cost: what it took of the limits in
-- messages or segments); or one row without a batch that says what it waits for and when (microseconds) to come back
-- (null: at the next wake). Start-time fair queueing (Goyal, Vin, Cheng 1996) on the tenant and, within it, on the
-- lane; single messages come first, but of ten grants in a row one is a campaign's; and where all slots of the horizon
-- are given, a campaign's batch makes way for one. What is even is told by a leaky bucket (ITU-T I.371, the generic cell
-- rate algorithm) beside the window, which alone keeps the limit. p_single_lead: no slot of a single message is earlier
-- than this from now (null: p_lead).
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
  soonest bigint; way bigint; fits boolean; even bigint; slack bigint;
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
      if l.class = 1 and t.v > now_ - 3600000000 then   -- a little early is early enough, and then several at once
        slack := greatest(window_us() / 16, window_us() / rps, window_us() * am.last_cost / acc.messages_per_second);
        even := greatest(case when l.rps < rps then rate_even(t, l.rps) end,
                         case when l.mps is not null then rate_even(tm, l.mps) end);
        if s < even - slack then st := greatest(st, even - slack / 2); end if;
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
      if l.class = 0 then t.v := s; end if;
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
