-- oldest code: 1
-- What has to be one round trip: claim, intent, settle, receipts. Times inside the limiter are microseconds of
-- the database clock. All are volatile in READ COMMITTED: each statement sees what the last lock holder left.

create function clock_us() returns bigint language sql volatile as
$$ select (extract(epoch from clock_timestamp()) * 1000000)::bigint $$;

create function to_us(p_at timestamptz) returns bigint language sql immutable as
$$ select (extract(epoch from p_at) * 1000000)::bigint $$;

create function from_us(p_us bigint) returns timestamptz language sql immutable as
$$ select to_timestamp(p_us / 1000000.0) $$;

-- Message ids are handed out in blocks without gaps, so that a batch is a range. The lock is held for this call
-- only, not for the caller's transaction; sequences do not roll back, so an id is never handed out again.
create function take_message_ids(p_n int) returns bigint language plpgsql as $$
declare first_ bigint;
begin
  perform pg_advisory_lock(7276301);
  first_ := nextval('message_id');
  if p_n > 1 then perform setval('message_id', first_ + p_n - 1); end if;
  perform pg_advisory_unlock(7276301);
  return first_;
end $$;

create function move_credits(p_tenant bigint, p_kind text, p_amount bigint, p_campaign bigint, p_batch bigint,
                             p_reason text) returns boolean language plpgsql as $$
declare c credit;
begin
  if p_amount = 0 then return true; end if;
  update credit
     set granted  = granted  + case when p_kind = 'grant' then p_amount else 0 end,
         spent    = spent    + case when p_kind = 'spend' then p_amount else 0 end,
         reserved = reserved + case p_kind when 'hold' then p_amount when 'grant' then 0 else -p_amount end
   where tenant_id = p_tenant and (p_kind <> 'hold' or granted - spent - reserved >= p_amount)
  returning * into c;
  if not found then return false; end if;
  insert into ledger (tenant_id, kind, amount, campaign_id, batch_id, reason, balance_after, reserved_after)
  values (p_tenant, p_kind, p_amount, nullif(p_campaign, 0), p_batch, p_reason, c.granted - c.spent, c.reserved);
  return true;
end $$;

-- A shard per connection, more or less: two settles of one campaign seldom wait for each other.
create function count_messages(p_campaign bigint, p_pending bigint, p_delivered bigint, p_delivery_failed bigint,
                               p_refused bigint, p_unknown bigint, p_skipped bigint, p_spent bigint)
returns void language sql as $$
  insert into campaign_counter as c
         (campaign_id, shard, pending, delivered, delivery_failed, refused, unknown, skipped, spent)
  select p_campaign, pg_backend_pid() % 8, p_pending, p_delivered, p_delivery_failed, p_refused, p_unknown,
         p_skipped, p_spent
   where p_campaign <> 0
  on conflict (campaign_id, shard) do update
     set pending = c.pending + excluded.pending, delivered = c.delivered + excluded.delivered,
         delivery_failed = c.delivery_failed + excluded.delivery_failed, refused = c.refused + excluded.refused,
         unknown = c.unknown + excluded.unknown, skipped = c.skipped + excluded.skipped,
         spent = c.spent + excluded.spent
$$;

-- The lane becomes non-empty: in a transaction of its own, or as the last statement of a short one.
-- `wakes` is what tells a claim that has just found nothing that it looked too early.
create function wake_lane(p_lane bigint, p_first bigint) returns void language plpgsql as $$
declare asleep boolean; account bigint;
begin
  select idle or not_before > clock_us(), account_id into asleep, account
    from lane where id = p_lane for no key update;
  update lane set idle = false, not_before = 0, cursor = least(cursor, p_first), wakes = wakes + 1
   where id = p_lane;
  if asleep then perform pg_notify('smsd_lane', account::text); end if;
end $$;

-- ------------------------------------------------------------------------------------------- limits

-- Locks one limiter row and drops what has left the window (1 s and the guard of 35 ms). State lost, first use or
-- a clock that went back: closed until every slot that anybody may still hold is out of the window.
create function rate_lock(p_scope int, p_id bigint, p_horizon bigint) returns rate language plpgsql as $$
declare r rate; now_ bigint; k int;
begin
  loop
    select * into r from rate where scope = p_scope and id = p_id for no key update;
    exit when found;
    insert into rate (scope, id, closed_until) values (p_scope, p_id, clock_us() + 1035000 + p_horizon)
    on conflict do nothing;
  end loop;
  now_ := clock_us();
  if r.last > now_ + 2 * p_horizon + 1000000 then
    r.ts := '{}'; r.cum := '{}'; r.base := 0; r.last := now_; r.last_cost := 0;
    r.closed_until := now_ + 1035000 + p_horizon;
    update rate set ts = '{}', cum = '{}', base = 0, last = now_, last_cost = 0, closed_until = r.closed_until
     where scope = p_scope and id = p_id;
    if p_scope = 1 then update lane set not_before = 0 where account_id = p_id and not_before > now_; end if;
  end if;
  k := width_bucket(now_ - 1035000, r.ts);
  if k > 0 then r.base := r.cum[k]; r.ts := r.ts[k + 1:]; r.cum := r.cum[k + 1:]; end if;
  return r;
end $$;

-- The earliest slot at which `cost` more fits: enough of the log must have left the window before it.
-- width_bucket over a sorted array is a binary search.
create function rate_earliest(r rate, p_cost int, p_limit int) returns bigint language plpgsql as $$
declare s bigint := r.closed_until; x bigint;
begin
  s := greatest(s, r.last);
  x := coalesce(r.cum[array_length(r.cum, 1)], r.base) + p_cost - p_limit;
  if x > r.base then s := greatest(s, r.ts[width_bucket(x - 1, r.cum) + 1] + 1035000); end if;
  return s;
end $$;

-- Adds a grant to the log; grants within 8 ms share an entry, at the later of their times.
create function rate_take(r rate, p_slot bigint, p_cost int) returns rate language plpgsql as $$
declare k int := coalesce(array_length(r.ts, 1), 0);
begin
  if k > 0 and r.ts[k] / 8000 = p_slot / 8000 then
    r.ts[k] := greatest(r.ts[k], p_slot); r.cum[k] := r.cum[k] + p_cost;
  else
    r.cum := r.cum || (case when k > 0 then r.cum[k] else r.base end + p_cost);
    r.ts := r.ts || greatest(r.ts[k], p_slot);
  end if;
  r.last := greatest(r.last, p_slot); r.last_cost := p_cost;
  return r;
end $$;

create function rate_keep(r rate) returns void language sql as $$
  update rate set ts = r.ts, cum = r.cum, base = r.base, last = r.last, last_cost = r.last_cost, v = r.v
   where scope = r.scope and id = r.id
$$;

-- A grant that was not used: taken out of every log that it stands in. One that has left the window stands in none.
create function give_back(p_account bigint, p_tenant bigint, p_slot bigint, p_n int) returns void
language plpgsql as $$
declare r rate; i int; c int;
begin
  for r in select * from rate
            where (scope = 0 and id = 0) or (scope in (1, 2) and id = p_account) or (scope in (3, 4) and id = p_tenant)
            order by case scope when 1 then 0 when 0 then 1 else scope end for no key update
  loop
    continue when p_slot <= clock_us() - 1035000;
    i := width_bucket(p_slot - 1, r.ts) + 1;
    continue when i > coalesce(array_length(r.ts, 1), 0);
    c := case when r.scope in (2, 4) then p_n else 1 end;
    for j in i .. array_length(r.ts, 1) loop r.cum[j] := r.cum[j] - c; end loop;
    update rate set cum = r.cum where scope = r.scope and id = r.id;
  end loop;
end $$;

-- A POST whose answer shows that it may have arrived after its slot and the guard: it is counted as if it had left
-- when the answer came, even if its slot has left the window.
create function arrived_late(p_account bigint, p_tenant bigint, p_slot bigint, p_n int, p_until bigint) returns void
language plpgsql as $$
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

-- One request of an account's limit for something that is not a batch (a GET). Null: come back later.
create function grant_request(p_account bigint, p_horizon bigint, p_global int)
returns table (slot bigint, now_us bigint, back_us bigint) language plpgsql as $$
declare a rate; g rate; acc traffic_account; s bigint; now_ bigint;
begin
  a := rate_lock(1, p_account, p_horizon);
  select * into acc from traffic_account where id = p_account;
  if p_global is not null then g := rate_lock(0, 0, p_horizon); end if;
  now_ := clock_us();
  s := greatest(now_, coalesce(to_us(acc.blocked_until), 0), rate_earliest(a, 1, acc.requests_per_second),
                a.last + 1035000 * a.last_cost / acc.requests_per_second);
  if p_global is not null then s := greatest(s, rate_earliest(g, 1, p_global)); end if;
  if s > now_ + p_horizon then return query select null::bigint, now_, s - p_horizon; return; end if;
  perform rate_keep(rate_take(a, s, 1));
  if p_global is not null then perform rate_keep(rate_take(g, s, 1)); end if;
  return query select s, now_, null::bigint;
end $$;

-- ------------------------------------------------------------------------------------------- claim

-- Cuts a ready batch after its first p_most open messages; the rest becomes a ready batch of its own, in place.
create function cut_batch(p_batch bigint, p_most int) returns void language plpgsql as $$
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
                     not_before, sender, pair, created_at)
  values (b.campaign_id, b.lane_id, b.tenant_id, b.account_id, cut, b.last_id, b.n - p_most, worth,
          b.state, b.tries, b.not_before, b.sender, b.pair, b.created_at);
end $$;

-- One round trip: the fair lane, a slot under every limit, the lease of up to p_want batches. The limiter row of the
-- account is the one lock that serialises its claims. Returns a row a batch; or one row without a batch that says
-- what it waits for and when (microseconds) to come back (null: at the next wake).
-- Start-time fair queueing (Goyal, Vin, Cheng 1996) on the tenant and, within it, on the lane.
create function claim(p_account bigint, p_replica bigint, p_want int, p_lead bigint, p_horizon bigint, p_global int,
                      p_priority_only boolean)
returns table (batch_id bigint, epoch int, campaign_id bigint, tenant_id bigint, n int, slot bigint, now_us bigint,
               waits_for text)
language plpgsql set plan_cache_mode = force_generic_plan as $$
#variable_conflict use_column
declare
  a rate; am rate; g rate; t rate; tm rate; acc traffic_account; b batch; l record;
  now_ bigint; s bigint; st bigint; back bigint; due timestamptz; why text; cost float8; start_ float8;
  got int := 0; most int; hit boolean; taken boolean := false;
begin
  a := rate_lock(1, p_account, p_horizon);
  select * into acc from traffic_account where id = p_account;
  if not found or acc.paused_reason is not null then
    return query select null::bigint, 0, 0::bigint, 0::bigint, 0, null::bigint, clock_us(), 'account_paused'; return;
  end if;
  if not exists (select from replica where id = p_replica and gone_at is null) then
    return query select null::bigint, 0, 0::bigint, 0::bigint, 0, null::bigint, clock_us(), 'replica_gone'; return;
  end if;
  if p_global is not null then g := rate_lock(0, 0, p_horizon); end if;
  if acc.messages_per_second is not null then am := rate_lock(2, p_account, p_horizon); end if;
  now_ := clock_us();                                   -- after the locks, never now()
  while got < p_want and not taken loop
    hit := false;
    for l in
      select ln.id, ln.tenant_id, ln.v, ln.cursor, ln.wakes, te.weight, te.requests_per_second as rps,
             te.messages_per_second as mps, coalesce(sh.v, 0) as share_v, coalesce(sh.lane_v, 0) as lane_v
        from lane ln
        join tenant te on te.id = ln.tenant_id
        left join share sh on sh.account_id = ln.account_id and sh.tenant_id = ln.tenant_id
       where ln.account_id = p_account and not ln.idle and not ln.paused and not ln.closed
         and ln.not_before <= now_ + p_horizon and (ln.class = 0 or not p_priority_only)
       order by (ln.class = 0 and coalesce(sh.v, 0) <= a.v + 1.0 / te.weight) desc,
                greatest(coalesce(sh.v, 0), a.v), coalesce(sh.v, 0), greatest(ln.v, coalesce(sh.lane_v, 0)), ln.id
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
      most := least(b.n, acc.largest_request, acc.messages_per_second, l.mps);
      if most < b.n then                                -- larger than a limit: cut in place, never let through
        perform cut_batch(b.id, most);
        b.n := most;
      end if;
      s := greatest(now_ + p_lead, to_us(acc.blocked_until), rate_earliest(a, 1, acc.requests_per_second),
                    a.last + 1035000 * a.last_cost / acc.requests_per_second);
      if p_global is not null then s := greatest(s, rate_earliest(g, 1, p_global)); end if;
      if acc.messages_per_second is not null then
        s := greatest(s, rate_earliest(am, b.n, acc.messages_per_second),
                      am.last + 1035000 * am.last_cost::bigint / acc.messages_per_second);
      end if;
      if s > now_ + p_horizon then
        taken := true; back := s - p_horizon; why := 'account_limit';
        if acc.blocked_until > clock_timestamp() then why := 'account_throttled'; end if;
        exit;
      end if;
      t := rate_lock(3, l.tenant_id, p_horizon);
      st := greatest(s, rate_earliest(t, 1, l.rps));
      if l.mps is not null then
        tm := rate_lock(4, l.tenant_id, p_horizon);
        st := greatest(st, rate_earliest(tm, b.n, l.mps));
      end if;
      if st > s then                                    -- stepped over: the account's slot is not spent on it
        update lane set not_before = st where id = l.id;
        back := least(back, st - p_lead); why := 'tenant_limit';
        continue;
      end if;
      a := rate_take(a, s, 1);
      if p_global is not null then g := rate_take(g, s, 1); end if;
      if acc.messages_per_second is not null then am := rate_take(am, s, b.n); end if;
      perform rate_keep(rate_take(t, s, 1));
      if l.mps is not null then perform rate_keep(rate_take(tm, s, b.n)); end if;
      -- Paid alike in requests and messages; a lane that was idle or stepped over brings no credit along.
      cost := greatest(1.0 / acc.requests_per_second, b.n::float8 / acc.messages_per_second);
      start_ := greatest(l.v, l.lane_v);
      a.v := greatest(a.v, l.share_v);
      insert into share as sh (account_id, tenant_id, v, lane_v)
      values (p_account, l.tenant_id, a.v + cost / l.weight, start_)
      on conflict (account_id, tenant_id) do update set v = excluded.v, lane_v = excluded.lane_v;
      update lane
         set v = start_ + cost,
             cursor = case when b.state = 1 then cursor when wakes = l.wakes then b.first_id + 1
                           else least(cursor, b.first_id + 1) end
       where id = l.id;
      update batch set state = 2, owner = p_replica, epoch = epoch + 1, slot = s where id = b.id;
      got := got + 1; hit := true;
      batch_id := b.id; epoch := b.epoch + 1; campaign_id := b.campaign_id; tenant_id := l.tenant_id; n := b.n;
      slot := s; now_us := now_; waits_for := null;
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
                      case when back is not null then greatest(back, now_ + 1000) end, now_, coalesce(why, 'work');
end $$;

-- ------------------------------------------------------------------------------------------- intent

-- A batch that will not be sent after all: its holds come back, its messages show as cancelled.
create function cancel_batch(p_batch bigint, p_states smallint[]) returns boolean language plpgsql as $$
declare b batch;
begin
  update batch set state = 12, owner = null, done_at = clock_timestamp()
   where id = p_batch and state = any (p_states) returning * into b;
  if not found then return false; end if;
  perform move_credits(b.tenant_id, 'release', b.segments, b.campaign_id, b.id, 'cancelled');
  return true;
end $$;

-- Durable word that this batch is about to be posted, with one more look at whether it may be. Drops the messages
-- whose number opted out meanwhile. verdict: post | lost (not ours any more) | cancelled | paused (or throttled) |
-- empty.
create function intent(p_batch bigint, p_owner bigint, p_epoch int)
returns table (verdict text, attempt int, sender text, ids bigint[], phones bigint[], texts text[])
language plpgsql set plan_cache_mode = force_generic_plan as $$
#variable_conflict use_column
declare b batch; l lane; dropped int := 0; worth bigint := 0; halted boolean;
begin
  select * into b from batch
   where id = p_batch and state = 2 and owner = p_owner and epoch = p_epoch for no key update;
  if not found then verdict := 'lost'; return next; return; end if;
  select * into l from lane where id = b.lane_id;
  if l.closed then
    perform cancel_batch(b.id, '{2}');
    perform give_back(b.account_id, b.tenant_id, b.slot, b.n);
    verdict := 'cancelled'; return next; return;
  end if;
  select l.paused or x.paused_reason is not null or coalesce(x.blocked_until > clock_timestamp(), false) into halted
    from traffic_account x where x.id = b.account_id;
  if halted then
    perform withdraw(b.id, b.epoch, 'paused');
    verdict := 'paused'; return next; return;
  end if;
  if b.campaign_id <> 0 then
    with gone as (
      update message m set state = 50, reason = 'opted_out', finished_at = clock_timestamp()
       where m.campaign_id = b.campaign_id and m.id between b.first_id and b.last_id and m.state is null
         and exists (select from opt_out o where o.tenant_id = b.tenant_id and o.phone = m.phone)
      returning m.segments)
    select count(*), coalesce(sum(gone.segments), 0) into dropped, worth from gone;
  end if;
  if dropped > 0 then
    perform count_messages(b.campaign_id, 0, 0, 0, 0, 0, dropped, 0);
    perform move_credits(b.tenant_id, 'release', worth, b.campaign_id, b.id, 'opted_out');
  end if;
  if dropped = b.n then
    update batch set state = 10, n = 0, segments = 0, owner = null, done_at = clock_timestamp() where id = b.id;
    perform give_back(b.account_id, b.tenant_id, b.slot, b.n);
    verdict := 'empty'; return next; return;
  end if;
  update batch set state = 3, attempt = batch.attempt + 1, n = batch.n - dropped, segments = batch.segments - worth
   where id = b.id;
  insert into attempt (batch_id, n, campaign_id, first_id, last_id, replica_id, slot_at, pair)
  values (b.id, b.attempt + 1, b.campaign_id, b.first_id, b.last_id, p_owner, from_us(b.slot), b.pair);
  return query
    select 'post', b.attempt + 1, b.sender, array_agg(m.id), array_agg(m.phone), array_agg(m.text)
      from (select id, phone, text from message m
             where m.campaign_id = b.campaign_id and m.id between b.first_id and b.last_id and m.state is null
             order by id) m;
end $$;

-- Nobody waits for what is unknown; what turns out not to have been sent is to be sent by a campaign that goes on.
create function reopen_campaign(p_campaign bigint) returns void language sql as $$
  select from campaign where id = p_campaign for no key update;   -- even if it still sends: it might end this moment
  update campaign set status = 'sending', finished_at = null, updated_at = clock_timestamp()
   where id = p_campaign and status in ('completed', 'failed')
$$;

-- Given up before the first byte: back to its place with its grant returned and no try counted. The epoch names the
-- lease, and a lease has at most one intent, so an intent whose commit was not acknowledged is taken back likewise,
-- even if it was reaped as unknown meanwhile.
create function withdraw(p_batch bigint, p_epoch int, p_why text) returns boolean language plpgsql as $$
declare b batch;
begin
  select * into b from batch where id = p_batch and epoch = p_epoch and state in (2, 3, 11) for no key update;
  if not found then return false; end if;
  update batch set state = case when tries > 0 then 1 else 0 end, owner = null, slot = null,
                   not_before = case when tries > 0 then clock_timestamp() end
   where id = b.id;
  if b.state <> 2 then
    update attempt set outcome = 'withdrawn', detail = p_why, ended_at = clock_timestamp()
     where batch_id = b.id and n = b.attempt and (outcome is null or outcome = 'unknown');
  end if;
  if b.state = 11 then perform reopen_campaign(b.campaign_id); end if;
  perform give_back(b.account_id, b.tenant_id, b.slot, b.n);
  if (select closed from lane where id = b.lane_id) then
    perform cancel_batch(b.id, '{0,1}');
  else
    perform wake_lane(b.lane_id, b.first_id);
  end if;
  return true;
end $$;

-- ------------------------------------------------------------------------------------------- settle

create function end_attempt(p_batch bigint, p_attempt int, p_outcome text, p_status int, p_detail text,
                            p_refusal text) returns void language sql as $$
  update attempt set outcome = p_outcome, status = p_status, detail = p_detail, refusal = p_refusal,
                     ended_at = clock_timestamp()
   where batch_id = p_batch and n = p_attempt and (outcome is null or outcome = 'unknown')
$$;

-- A result for which nothing is open any more. True: it is the one that was written already, by a call whose
-- acknowledgement got lost. False: a newer attempt was made meanwhile, so this is recorded and nothing else.
create function written_before(p_batch bigint, p_attempt int, p_outcome text, p_status int) returns boolean
language plpgsql as $$
begin
  update attempt set outcome = p_outcome, status = p_status, detail = 'answered after a newer attempt'
   where batch_id = p_batch and n = p_attempt and (outcome is null or outcome in ('unknown', 'withdrawn'));
  return not found;
end $$;

-- Mitto took the request and decided item by item. Evidence for attempt p_attempt, whoever owns the batch now;
-- false (and nothing changed but the attempt's row) after a newer attempt.
-- p_states: 5 unknown, 10 accepted, 40 refused. An id that is already somebody's makes its message unknown.
create function settle_items(p_batch bigint, p_attempt int, p_ids bigint[], p_states smallint[],
                             p_provider_ids text[], p_details text[], p_bulk_id text, p_status int)
returns boolean language plpgsql set plan_cache_mode = force_generic_plan as $$
declare
  b batch; ours bigint[]; taken int; now_ timestamptz := clock_timestamp();
  accepted bigint; refused bigint; unknown_ bigint; worth_accepted bigint; worth_refused bigint;
begin
  select * into b from batch where id = p_batch;
  if b.state not in (3, 11) or b.attempt <> p_attempt then
    return written_before(p_batch, p_attempt, case when 40 = all (p_states) then 'refused' else 'duplicate' end,
                          p_status);
  end if;
  with u as (
    select * from unnest(p_ids, p_states, p_provider_ids) as u(id, state, provider_id)),
  ins as (
    insert into provider_message (provider_id, campaign_id, message_id, account_id)
    select u.provider_id, b.campaign_id, u.id, b.account_id from u where u.state = 10
    on conflict do nothing returning message_id)
  select array_agg(message_id) into ours from ins;
  ours := coalesce(ours, '{}');
  select count(*) into taken from unnest(p_states) as u(state) where u.state = 10;
  with u as (
    select u.id, u.provider_id, u.detail,
           case when u.state = 10 and cardinality(ours) < taken and u.id <> all (ours) then 5::smallint
                else u.state end as state
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
  update batch set state = 10, n = 0, segments = 0, owner = null, bulk_id = p_bulk_id, done_at = now_
   where id = b.id and state in (3, 11) and attempt = p_attempt;
  if not found then raise exception 'batch % moved while its answer was written', p_batch
    using errcode = 'serialization_failure'; end if;
  perform count_messages(b.campaign_id, accepted, 0, 0, refused, unknown_, 0, worth_accepted);
  perform move_credits(b.tenant_id, 'spend', worth_accepted, b.campaign_id, b.id, 'accepted');
  perform move_credits(b.tenant_id, 'release', worth_refused, b.campaign_id, b.id, 'refused');
  perform end_attempt(b.id, p_attempt, 'accepted', p_status, null, null);
  return true;
end $$;

-- All that is still open in a batch is refused, and its holds come back.
create function refuse_batch(p_batch bigint, p_reason text, p_detail text) returns void language plpgsql as $$
declare b batch; refused bigint; worth bigint;
begin
  select * into b from batch where id = p_batch;
  with done as (
    update message m set state = 40, reason = p_reason, detail = p_detail, settled_at = clock_timestamp(),
                         finished_at = clock_timestamp()
     where m.campaign_id = b.campaign_id and m.id between b.first_id and b.last_id and m.state is null
    returning m.segments)
  select count(*), coalesce(sum(segments), 0) into refused, worth from done;
  update batch set state = 10, n = 0, segments = 0, owner = null, done_at = clock_timestamp() where id = b.id;
  perform count_messages(b.campaign_id, 0, 0, 0, refused, 0, 0, 0);
  perform move_credits(b.tenant_id, 'release', worth, b.campaign_id, b.id, 'refused');
end $$;

-- The whole batch had one outcome. Returns what became of it: ready | waiting | failed | unknown | split |
-- lane_paused | cancelled | late (after a newer attempt) | settled (by an earlier call for the same result).
--   again    to be tried once more after p_delay_seconds, doubled with each try; the p_most-th time all is refused
--   back     not counted, keeps its place (throttled, never left, a broken account or lane, too large)
--   refused  for good: one message is refused, more are split in two to find the bad one
--   unknown  may have been accepted: stays, with its holds, until there is evidence
create function settle_batch(p_batch bigint, p_attempt int, p_action text, p_outcome text, p_status int,
                             p_detail text, p_delay_seconds float8, p_most int, p_refusal text)
returns text language plpgsql as $$
declare b batch; l lane; alike boolean; delay interval := make_interval(secs => p_delay_seconds);
begin
  if p_action = 'refused' then                          -- may pause the campaign: locked before its batch, as everywhere
    perform from campaign where id = (select campaign_id from batch where id = p_batch) for no key update;
  end if;
  select * into b from batch
   where id = p_batch and state in (3, 11) and attempt = p_attempt for no key update;
  if not found then
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

-- Two halves, each to be posted by itself. At most 20 splits a campaign and minute; past that the halves wait.
create function split_batch(p_batch bigint, p_lane bigint) returns void language plpgsql as $$
declare b batch; l lane; wait_until timestamptz;
begin
  update lane set splits = case when splits_since < clock_timestamp() - interval '1 minute' then 1 else splits + 1 end,
                  splits_since = case when splits_since < clock_timestamp() - interval '1 minute'
                                      then clock_timestamp() else splits_since end
   where id = p_lane returning * into l;
  if l.splits > 20 then wait_until := l.splits_since + interval '1 minute'; end if;
  update batch set state = case when wait_until is null then 0 else 1 end, owner = null, slot = null,
                   not_before = wait_until, pair = nextval('batch_pair') where id = p_batch returning * into b;
  perform cut_batch(p_batch, (b.n + 1) / 2);
end $$;

create function pause_campaign(p_campaign bigint, p_reason text, p_detail text) returns boolean
language plpgsql as $$
begin
  update campaign set status = 'paused', paused_reason = p_reason, paused_detail = p_detail,
                      updated_at = clock_timestamp()
   where id = p_campaign and status = 'sending';
  if not found then return false; end if;
  update expansion set state = 'paused' where campaign_id = p_campaign and state = 'running';
  update lane set paused = true where campaign_id = p_campaign;
  return true;
end $$;

-- A paused campaign goes on; p_reason null: whatever it was paused for. False: it was not paused for that.
create function resume_campaign(p_campaign bigint, p_reason text) returns boolean language plpgsql as $$
declare l record;
begin
  update campaign set status = 'sending', paused_reason = null, paused_detail = null, updated_at = clock_timestamp()
   where id = p_campaign and status = 'paused' and (p_reason is null or paused_reason = p_reason);
  if not found then return false; end if;
  update expansion set state = 'running' where campaign_id = p_campaign and state = 'paused';
  perform pg_notify('smsd_expansion', p_campaign::text);
  for l in update lane set paused = false where campaign_id = p_campaign returning id, account_id loop
    perform wake_lane(l.id, 0);
    perform pg_notify('smsd_lane', l.account_id::text);   -- a lane may be awake and paused: then its wake is silent
  end loop;
  return true;
end $$;

-- The hold taken at enqueue is an estimate. A chunk of p_read recipients moves its share of it to the exact figure;
-- the last chunk brings back what is left. False when the exact figure needs more credits than there are.
create function settle_hold(p_campaign bigint, p_read bigint, p_exact bigint, p_last boolean) returns boolean
language plpgsql as $$
declare e expansion; share_ bigint;
begin
  select * into e from expansion where campaign_id = p_campaign;
  share_ := e.held;
  if not p_last then
    -- `read` has moved past this chunk already: what was left before it is what is left now and the chunk
    share_ := least(e.held, ceil(e.held::numeric * p_read / greatest(e.of - e.read + p_read, p_read, 1)));
  end if;
  update expansion set held = held - share_ where campaign_id = p_campaign;
  if p_exact > share_ then
    return move_credits(e.tenant_id, 'hold', p_exact - share_, p_campaign, null, 'expansion');
  end if;
  return move_credits(e.tenant_id, 'release', share_ - p_exact, p_campaign, null, 'expansion');
end $$;

-- ------------------------------------------------------------------------------------------- receipts

-- The largest state seen wins, so order and repeats do not matter. p_accounts names the account where the webhook's
-- secret told it: an id of another account is then not touched. Ids that are not ours yet are kept.
-- Nested loops pinned: on tables that were never analysed the planner reads them whole (20,000 receipts/s at best).
create function apply_receipts(p_accounts bigint[], p_ids text[], p_states smallint[], p_at timestamptz[],
                               p_descriptions text[], out updated bigint, out kept bigint)
language plpgsql set plan_cache_mode = force_generic_plan
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off as $$
begin
  with r as (
    select distinct on (u.provider_id, u.account_id) u.*
      from unnest(p_accounts, p_ids, p_states, p_at, p_descriptions)
           as u(account_id, provider_id, state, at, description)
     order by u.provider_id, u.account_id, u.state desc, u.at),
  known as (
    select r.*, k.campaign_id, k.message_id from r
      join provider_message k on k.provider_id = r.provider_id and k.account_id = coalesce(r.account_id, k.account_id)),
  best as (
    select distinct on (campaign_id, message_id) * from known order by campaign_id, message_id, state desc, at),
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
  early as (
    insert into early_receipt (provider_id, account_id, state, at, description)
    select r.provider_id, r.account_id, r.state, r.at, r.description from r
     where not exists (select from known
                        where known.provider_id = r.provider_id
                          and known.account_id is not distinct from r.account_id)
    returning 1)
  select (select count(*) from moved), (select count(*) from early) into updated, kept;
end $$;

-- Early receipts whose message is known by now. p_ids null: all of them. Meant for a new snapshot, after the
-- commit of the settle or the receipt that may have missed the other.
create function rejoin_receipts(p_ids text[]) returns bigint language plpgsql as $$
declare accounts bigint[]; ids text[]; states smallint[]; ats timestamptz[]; descriptions text[];
begin
  if p_ids is null then
    with e as (
      delete from early_receipt e using provider_message k
       where k.provider_id = e.provider_id and k.account_id = coalesce(e.account_id, k.account_id) returning e.*)
    select array_agg(account_id), array_agg(provider_id), array_agg(state), array_agg(at), array_agg(description)
      into accounts, ids, states, ats, descriptions from e;
  else
    with e as (
      delete from early_receipt e using provider_message k
       where e.provider_id = any (p_ids)
         and k.provider_id = e.provider_id and k.account_id = coalesce(e.account_id, k.account_id) returning e.*)
    select array_agg(account_id), array_agg(provider_id), array_agg(state), array_agg(at), array_agg(description)
      into accounts, ids, states, ats, descriptions from e;
  end if;
  if ids is null then return 0; end if;
  return (select updated from apply_receipts(accounts, ids, states, ats, descriptions));
end $$;

-- ------------------------------------------------------------------------------------------- the dead

-- What replicas that are gone left: leases without intent go back to their place, intents without a result are
-- unknown at their attempt. A lease whose slot is long past goes back whoever has it: it will not be used, and its
-- owner may not even know of it (a claim whose answer got lost). Returns how many of each.
create function reap(out released bigint, out unknown bigint) language plpgsql as $$
declare b record;
begin
  released := 0; unknown := 0;
  for b in
    select x.id, x.state, x.epoch, x.attempt, x.lane_id, x.first_id
      from batch x join replica r on r.id = x.owner
     where (x.state in (2, 3) and r.gone_at is not null) or (x.state = 2 and x.slot < clock_us() - 5000000)
     order by x.id for no key update of x skip locked
  loop
    if b.state = 3 then
      update batch set state = 11, owner = null where id = b.id;
      perform end_attempt(b.id, b.attempt, 'unknown', null, 'replica_died', null);
      unknown := unknown + 1;
    elsif (select closed from lane where id = b.lane_id) then   -- as it is now that the batch is locked
      perform cancel_batch(b.id, '{2}');
    else
      update batch set state = case when tries > 0 then 1 else 0 end, owner = null, slot = null,
                       not_before = case when tries > 0 then clock_timestamp() end
       where id = b.id;
      perform wake_lane(b.lane_id, b.first_id);
      released := released + 1;
    end if;
  end loop;
end $$;

-- ------------------------------------------------------------------------------------------- campaigns
-- Locks are taken in one order everywhere: campaign, expansion, batches by id, counters, credit, lane.

-- Nothing more of it will leave: what is leased is dropped by its intent, what is being posted is recorded as it
-- ends. One release for all that was held. Returns false when it had ended already, or had never begun.
create function cancel_campaign(p_campaign bigint) returns boolean language plpgsql as $$
declare tenant bigint; worth bigint; rest bigint; seen bigint := 0; now_seen bigint;
begin
  update campaign set status = 'cancelled', finished_at = clock_timestamp(), updated_at = clock_timestamp(),
                      paused_reason = null, paused_detail = null
   where id = p_campaign and status in ('scheduled', 'sending', 'paused') returning tenant_id into tenant;
  if not found then return false; end if;
  select held into rest from expansion where campaign_id = p_campaign for no key update;
  update expansion set state = 'stopped', held = 0, updated_at = clock_timestamp()
   where campaign_id = p_campaign and state in ('running', 'paused');
  if not found then rest := 0; end if;
  -- Until two looks see the same: whoever gives a batch back, or cuts one, holds an open batch meanwhile.
  loop
    select count(*) into now_seen
      from (select from batch where campaign_id = p_campaign and state < 10 order by id for no key update) open;
    exit when now_seen = seen;
    seen := now_seen;
  end loop;
  with stopped as (
    update batch set state = 12, owner = null, done_at = clock_timestamp()
     where campaign_id = p_campaign and state in (0, 1) returning segments)
  select coalesce(sum(segments), 0) into worth from stopped;
  perform move_credits(tenant, 'release', worth + coalesce(rest, 0), p_campaign, null, 'cancelled');
  update lane set closed = true where campaign_id = p_campaign;
  return true;
end $$;

-- What was certainly refused waits again in the batches it was in, paid anew. held is false when the credits do not
-- reach: the caller then rolls back. A campaign that had ended goes on; one that is paused stays so.
create function retry_failed(p_campaign bigint, out retried bigint, out required bigint, out held boolean)
language plpgsql as $$
declare tenant bigint;
begin
  retried := 0; required := 0; held := true;
  select tenant_id into tenant from campaign
   where id = p_campaign and status in ('sending', 'paused', 'completed', 'failed') for no key update;
  if not found then return; end if;
  with failed as (
    update message m set state = null, reason = null, detail = null, settled_at = null, finished_at = null
     where m.campaign_id = p_campaign and m.state = 40 and m.reason in ('refused_by_provider', 'server_error')
       and (select b.state from batch b where b.first_id <= m.id order by b.first_id desc limit 1) = 10
    returning m.id, m.segments),
  per_batch as (
    select b.id, count(*) as n, sum(failed.segments) as worth
      from failed
      cross join lateral (select id from batch where first_id <= failed.id order by first_id desc limit 1) b
     group by b.id),
  opened as (
    update batch b set state = 0, n = per_batch.n, segments = per_batch.worth, tries = 0, owner = null, slot = null,
                       not_before = null, pair = null, done_at = null
      from per_batch where b.id = per_batch.id and b.state = 10
    returning b.n, b.segments)
  select coalesce(sum(n), 0), coalesce(sum(segments), 0) into retried, required from opened;
  if retried = 0 then return; end if;
  perform count_messages(p_campaign, 0, 0, 0, -retried, 0, 0, 0);
  held := move_credits(tenant, 'hold', required, p_campaign, null, 'retry');
  update campaign set status = 'sending', finished_at = null, updated_at = clock_timestamp()
   where id = p_campaign and status in ('completed', 'failed');
  update lane set closed = false where campaign_id = p_campaign;
  perform wake_lane(id, 0) from lane where campaign_id = p_campaign;
end $$;

-- Ends each campaign whose audience is read and whose batches all have an outcome. Failed only if then nothing was
-- accepted, nothing is unknown, and something was refused.
create function finish_campaigns() returns setof bigint language plpgsql as $$
declare candidate record; accepted bigint; unknown_ bigint; refused_ bigint;
begin
  for candidate in
    select c.id, e.lane_id from campaign c join expansion e on e.campaign_id = c.id
     where c.status = 'sending' and e.state in ('done', 'stopped')
       and not exists (select from batch b where b.lane_id = e.lane_id and b.state < 10)
       for no key update of c skip locked
  loop
    -- Once more, now that it is locked: a retry may have come in between.
    continue when exists (select from batch b where b.lane_id = candidate.lane_id and b.state < 10);
    select pending + delivered + delivery_failed, unknown, refused into accepted, unknown_, refused_
      from campaign_totals where campaign_id = candidate.id;
    update campaign
       set status = case when accepted + unknown_ = 0 and refused_ > 0 then 'failed' else 'completed' end,
           finished_at = clock_timestamp(), updated_at = clock_timestamp()
     where id = candidate.id and status = 'sending';
    if found then return next candidate.id; end if;
  end loop;
end $$;
