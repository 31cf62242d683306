-- oldest code: 3
-- Why work waits: what only one replica knows, and what an explanation counts.

-- Where a replica's circuit breaker is open. Written when it opens, opens for longer, or closes; for explanations only.
-- A row of a replica that is gone says nothing.
create table replica_account (
  account_id     bigint not null,
  replica_id     bigint not null,
  missed         int not null,
  detail         text not null,
  opened_at      timestamptz not null default clock_timestamp(),
  breaker_until  timestamptz not null,
  primary key (account_id, replica_id)
);

-- What stands in a limiter's window now. Null: the row is missing, its state was lost.
create function rate_used(r rate) returns bigint language sql volatile as $$
  select coalesce(r.cum[cardinality(r.cum)], r.base)
         - coalesce(r.cum[nullif(width_bucket(clock_us() - window_us(), r.ts), 0)], r.base)
$$;

-- Lanes with messages that may have been accepted: batches that speak for theirs, messages that do so themselves (a
-- campaign counts those), and since when.
create view lane_unknown as
select b.lane_id, b.account_id, b.campaign_id, count(*) filter (where b.state = 11) as batches,
       (coalesce(sum(b.n) filter (where b.state = 11), 0)
        + coalesce((select sum(k.unknown) from campaign_counter k where k.campaign_id = b.campaign_id), 0)
        + coalesce(sum(case when b.campaign_id = 0 then
            (select count(*) from message m
              where m.campaign_id = 0 and m.id between b.first_id and b.last_id and m.state = 5) end), 0))::bigint
       as messages,
       min(a.intent_at) as since
  from batch b
  left join attempt a on a.batch_id = b.id and a.n = b.attempt
 where b.state = 11 or b.unsure > 0
 group by b.lane_id, b.account_id, b.campaign_id;

-- Lanes with something open.
create view lane_open as
select lane_id from batch where state < 10 group by lane_id
union select lane_id from expansion where state in ('running', 'paused')
union select lane_id from lane_unknown where messages > 0;
