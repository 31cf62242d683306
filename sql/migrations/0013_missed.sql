-- oldest code: 3
-- What was leased and missed its slot is soon somebody else's.

-- Under the lock of the account's limiter row: a batch leased without intent goes back to its place, and what its lane
-- and its tenant paid is theirs again. Whoever had it learns that from its intent, which finds it lost.
create function take_back(b batch, acc traffic_account, p_rps int, p_why text) returns void
language plpgsql set enable_sort = off as $$
declare paid float8 := greatest(1.0 / p_rps, b.cost::float8 / acc.messages_per_second);
begin
  perform withdraw(b.id, b.epoch, p_why);
  perform turn_keep(b.lane_id, t.v - paid, null) from turn_newest(b.lane_id) t;
  perform share_keep(acc.id, b.tenant_id, sh.v - paid / (select weight from tenant where id = b.tenant_id), sh.lane_v)
     from share_newest(acc.id, b.tenant_id) sh;
end $$;

-- How much later than its slot a batch without intent is taken back: whoever had it was killed, or is so late that it
-- would have to take another slot. Soon enough for the grant to be used within its window.
create function missed_us() returns bigint language sql immutable as $$ select 100000::bigint $$;

-- All that was leased of an account and missed its slot. Returns how many batches.
create function take_back_missed(p_account bigint) returns int language plpgsql as $$
declare b batch; acc traffic_account; missed bigint := clock_us() - missed_us(); n int := 0;
begin
  if not exists (select from batch where account_id = p_account and state = 2
                                     and slot between missed - 6000000 and missed) then  -- earlier ones were reaped
    return 0;
  end if;
  perform rate_hold(1, p_account);
  select * into acc from traffic_account where id = p_account;
  for b in select x.* from batch x join lane l on l.id = x.lane_id
            where x.account_id = p_account and x.state = 2 and x.slot between missed - 6000000 and missed and not l.closed
            order by x.slot for no key update of x skip locked
  loop
    perform take_back(b, acc, limit_now(acc.requests_per_second, acc.ceiling, acc.ceiling_at), 'missed its slot');
    n := n + 1;
  end loop;
  return n;
end $$;

-- The first slot from p_from and before p_until that a campaign's batch has been given and has written no intent for:
-- the batch is taken back. It had taken at least p_cost of the account's limits; of another tenant's only where p_fits.
-- Null: there is none. Single messages get no more than half of what is on its way like this: with more of them,
-- campaigns keep the slots that they are given.
create or replace function make_way(acc traffic_account, p_tenant bigint, p_fits boolean, p_cost int, p_rps int,
                                    p_until bigint, p_from bigint)
returns bigint language plpgsql set enable_sort = off as $$
declare b batch;
begin
  select x.* into b from batch x join lane l on l.id = x.lane_id
   where x.account_id = acc.id and x.state = 2 and x.campaign_id <> 0 and x.slot >= p_from and x.slot < p_until
     and x.cost >= p_cost and (p_fits or x.tenant_id = p_tenant) and not l.closed
     and (select count(*) < 2 * count(*) filter (where y.campaign_id <> 0) from batch y
           where y.account_id = acc.id and y.state in (2, 3))
   order by x.slot limit 1 for no key update of x skip locked;
  if not found then return null; end if;
  perform take_back(b, acc, p_rps, 'made way for a single message');
  return b.slot;
end $$;
