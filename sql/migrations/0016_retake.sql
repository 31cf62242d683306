-- oldest code: 3
-- Who missed its slot leaves as soon as it can, where every limit has room.

-- Whether so much more fits at this slot, whatever was given after it: no window that the slot is in holds more than
-- the limit then. Those that end at the slot and at each later one are the fullest. Where grants share an entry some
-- left up to 8 ms before its time, so that its window may have begun as much earlier.
create function rate_fits_at(r rate, p_slot bigint, p_cost int, p_limit int) returns boolean
language plpgsql immutable as $$
declare
  n int := coalesce(array_length(r.ts, 1), 0); k int := width_bucket(p_slot, r.ts);
  ends bigint; gone int; shared boolean := false;
begin
  if k < n and r.ts[k + 1] / 8000 = p_slot / 8000 then  -- as rate_take will have it
    k := k + 1; shared := true;
  end if;
  for j in k .. n loop
    ends := greatest(p_slot, r.ts[j]);
    shared := shared or j > k and r.cum[j] - (case when j > 1 then r.cum[j - 1] else r.base end) > 1;
    ends := ends - case when shared then 8000 else 0 end;
    continue when ends >= p_slot + window_us();
    gone := width_bucket(ends - window_us(), r.ts);
    if (case when j > 0 then r.cum[j] else r.base end) - (case when gone > 0 then r.cum[gone] else r.base end) + p_cost
       > p_limit then
      return false;
    end if;
    shared := false;
  end loop;
  return true;
end $$;

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
