-- name: installation
-- What all lanes have in common: replicas whose heartbeat moved within $1 seconds, what all accounts together used in
-- the last second, and who has yet to say what it had posted after a failover or a restore. By the database's clock, and good enough for an explanation: nothing is decided by it.
select clock_timestamp() as now,
       (select count(*) from replica where gone_at is null
           and beat_at > clock_timestamp() - make_interval(secs => $1)) as replicas,
       (select max(coalesce(gone_at, beat_at)) from replica) as last_beat_at,
       coalesce((select rate_used(r) from rate_newest(0, 0) r), 0) as requests_used,
       instance_is_kept() as kept, (select found_at from instance) as found_at,
       array(select unnest(awaited) from instance except select unnest(asserted) from instance order by 1) as awaited;

-- name: campaign
-- A campaign of a tenant with its parts, and what its tenant has.
select c.id, c.status, c.created_at, c.updated_at, c.scheduled_at, t.queued, t.processing, t.unknown, t.pending,
       tenant.subscription, credit.granted - credit.spent - credit.reserved as available
  from campaign c
  join campaign_totals t on t.campaign_id = c.id
  join tenant on tenant.id = c.tenant_id
  join credit_newest(c.tenant_id) credit on true
 where c.id = $1 and c.tenant_id = $2;

-- name: accounts
-- Accounts (null: all) with their limits as they stand, oldest first, $3 at most. $2: as in installation. `slot_at` is
-- the earliest time at which one more request may leave.
with awake as (
  select w.account_id, count(*) as tenants, sum(t.weight) as weight
    from (select distinct account_id, tenant_id from lane where not idle and not paused and not closed) w
    join tenant t on t.id = w.tenant_id group by w.account_id)
select a.id, a.name, a.paused_reason, a.paused_detail, a.updated_at, a.requests_per_second, a.messages_per_second,
       a.limit_unit, a.max_in_flight, x.rps as limit_now,
       a.ceiling_at, case when wait_until(a.blocked_until, clock_us()) > clock_us() then a.blocked_until end
       as blocked_until,
       rate_used(r) as requests_used, rate_used(m) as messages_used,
       case when greatest(r.closed_until, m.closed_until) > clock_us() + 100000
            then from_us(greatest(r.closed_until, m.closed_until)) end as closed_until,
       case when r.scope is not null then
         from_us(greatest(clock_us(), wait_until(a.blocked_until, clock_us()), rate_earliest(r, 1, x.rps),
                          r.last + pace_us(r.last_cost, x.rps))) end as slot_at,
       coalesce(awake.tenants, 0) as tenants_awake, coalesce(awake.weight, 0) as weight_awake,
       f.n as in_flight,
       b.n as breakers, b.opened_at as breaker_since, b.until as breaker_until, b.detail as breaker_detail
  from traffic_account a
  cross join lateral (select limit_now(a.requests_per_second, a.ceiling, a.ceiling_at) as rps) x
  left join lateral rate_newest(1, a.id) r on true
  left join lateral rate_newest(2, a.id) m on a.messages_per_second is not null
  left join awake on awake.account_id = a.id
  cross join lateral (select count(*) as n from batch where account_id = a.id and state in (2, 3)) f
  cross join lateral (
    select count(*) as n, min(x.opened_at) as opened_at, min(x.breaker_until) as until, max(x.detail) as detail
      from replica_account x join replica on replica.id = x.replica_id
     where x.account_id = a.id and replica.gone_at is null
       and replica.beat_at > clock_timestamp() - make_interval(secs => $2)) b
 where $1::bigint[] is null or a.id = any ($1)
 order by a.id limit $3;

-- name: depths
-- How much is open in each account and state. Waiting is what is to be tried again later; what is due counts as ready.
select account_id, kind, sum(batches)::bigint as batches, sum(messages)::bigint as messages, min(since) as oldest_at
  from (select account_id, 1 as batches, n as messages, created_at as since,
               case when state = 0 or state = 1 and not_before <= clock_timestamp() then 'ready'
                    when state = 1 then 'waiting' when state = 2 then 'leased' when state = 3 then 'sending' end as kind
          from batch where state < 10
        union all
        select account_id, batches, messages, since, 'unknown' from lane_unknown where messages > 0) b
 group by account_id, kind;

-- name: count_lanes
-- How many lanes have something open, in an account or in all.
select count(*) from lane join lane_open on lane_open.lane_id = lane.id where $1::bigint is null or account_id = $1;

-- name: lanes
-- The lane of a campaign ($1), or else a page of those that have something open, in an account ($2) or in all. What is
-- less than a horizon (100 ms) ahead is given out already.
with busy as (
  select id from lane where campaign_id = $1 and campaign_id <> 0
  union all
  select lane_id from lane_open where $1 is null),
page as (
  select l.* from lane l join busy on busy.id = l.id
   where $2::bigint is null or l.account_id = $2
   order by l.account_id, l.class, l.id limit $3 offset $4),
turn as (                                               -- the order in which a claim would look at them
  select l.id, row_number() over (
           partition by l.account_id
           order by l.class, greatest(coalesce(s.v, 0), r.v), coalesce(s.v, 0), greatest(coalesce(t.v, 0), coalesce(s.lane_v, 0)),
                    l.id
         ) as position
    from lane l
    join lateral rate_newest(1, l.account_id) r on true
    left join share s on s.account_id = l.account_id and s.tenant_id = l.tenant_id
    left join lane_turn t on t.lane_id = l.id
   where l.account_id in (select account_id from page)
     and not l.idle and not l.paused and not l.closed and l.not_before <= clock_us() + 100000)
select l.id, l.account_id, l.tenant_id, l.campaign_id, l.class = 0 as priority, l.paused,
       case when l.not_before > clock_us() + 100000 then from_us(l.not_before) end as stepped_over_until,
       case when l.splits > 20 and l.splits_since > clock_timestamp() - interval '1 minute'
            then l.splits_since + interval '1 minute' end as splits_until,
       c.paused_reason, c.paused_detail, c.updated_at,
       e.state as expansion, e.read, e.of, c.started_at,
       t.weight, t.requests_per_second, t.messages_per_second, rate_used(r) as requests_used,
       rate_used(m) as messages_used,
       case when greatest(r.closed_until, m.closed_until) > clock_us() + 100000
            then from_us(greatest(r.closed_until, m.closed_until)) end as closed_until, turn.position,
       o.*, coalesce(u.batches, 0) as unknown, coalesce(u.messages, 0) as unknown_messages, u.since as unknown_since,
       last.status as retry_status, last.outcome as retry_outcome,
       last.detail as retry_detail, last.ended_at as retry_since
  from page l
  join tenant t on t.id = l.tenant_id
  left join campaign c on c.id = l.campaign_id
  left join expansion e on e.campaign_id = l.campaign_id
  left join lateral rate_newest(3, t.id) r on true
  left join lateral rate_newest(4, t.id) m on t.messages_per_second is not null
  left join turn on turn.id = l.id
  cross join lateral (
    select count(*) filter (where kind = 'ready') as ready,
           coalesce(sum(n) filter (where kind = 'ready'), 0)::bigint as ready_messages,
           count(*) filter (where kind = 'waiting') as waiting,
           coalesce(sum(n) filter (where kind = 'waiting'), 0)::bigint as waiting_messages,
           count(*) filter (where state = 2) as leased,
           coalesce(sum(n) filter (where state = 2), 0)::bigint as leased_messages,
           count(*) filter (where state = 3) as sending,
           coalesce(sum(n) filter (where state = 3), 0)::bigint as sending_messages,
           min(created_at) as oldest_at,
           min(created_at) filter (where kind = 'ready') as ready_since,
           count(*) filter (where kind = 'waiting' and tries > 0) as retries,
           coalesce(sum(n) filter (where kind = 'waiting' and tries > 0), 0)::bigint as retries_messages,
           min(not_before) filter (where kind = 'waiting' and tries > 0) as retry_at,
           coalesce(max(tries) filter (where kind = 'waiting'), 0) as tries
      from (select *, case when state = 0 or state = 1 and not_before <= clock_timestamp() then 'ready'
                           when state = 1 then 'waiting' end as kind
              from batch where lane_id = l.id and state < 10) b) o
  left join lane_unknown u on u.lane_id = l.id
  left join lateral (
    select a.status, a.outcome, a.detail, a.ended_at
      from (select * from batch where lane_id = l.id and state = 1 and tries > 0 order by not_before limit 1) b
      join attempt a on a.batch_id = b.id and a.n = b.attempt) last on true
 order by l.account_id, l.class, l.id;

-- name: count_replicas
-- How many registrations there are; $1 null: all, else those that are alive, or not. $2: as in installation.
select count(*) from replica r
 where $1::boolean is null
    or $1 = (r.gone_at is null and r.beat_at > clock_timestamp() - make_interval(secs => $2));

-- name: replicas
-- A page of registrations, newest first, each with the batches that it has leased.
select r.id, r.name, r.version, r.started_at, r.beat_at, r.gone_at, r.gone_reason,
       r.gone_at is null and r.beat_at > clock_timestamp() - make_interval(secs => $2) as alive,
       coalesce(o.leased, 0) as leased, coalesce(o.sending, 0) as sending
  from replica r
  left join (select owner, count(*) filter (where state = 2) as leased, count(*) filter (where state = 3) as sending
               from batch where state in (2, 3) group by owner) o on o.owner = r.id
 where $1::boolean is null
    or $1 = (r.gone_at is null and r.beat_at > clock_timestamp() - make_interval(secs => $2))
 order by r.id desc limit $3 offset $4;

-- name: open_breaker
-- This replica cannot reach Mitto for an account, and tries again after $5 seconds; what the gone left is forgotten.
with gone as (
  delete from replica_account x using replica r where x.account_id = $2 and r.id = x.replica_id and r.gone_at is not null)
insert into replica_account as x (replica_id, account_id, missed, detail, breaker_until)
values ($1, $2, $3, $4, clock_timestamp() + make_interval(secs => $5))
on conflict (account_id, replica_id) do update
   set missed = excluded.missed, detail = excluded.detail, breaker_until = excluded.breaker_until;

-- name: close_breaker
-- It can again.
delete from replica_account where replica_id = $1 and account_id = $2;

-- name: figures
-- Replicas as in installation, and the age in seconds of the oldest snapshot (not our own) that keeps vacuum from
-- clearing rows of this database.
select clock_timestamp() as now,
       (select count(*) from replica where gone_at is null
           and beat_at > clock_timestamp() - make_interval(secs => $1)) as replicas,
       (select coalesce(max(extract(epoch from clock_timestamp() - coalesce(xact_start, query_start))), 0)::float8
          from pg_stat_activity
         where datname = current_database() and backend_xmin is not null and pid <> pg_backend_pid()) as oldest_snapshot;
