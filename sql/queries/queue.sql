-- name: register_replica
-- A new registration: a new id, so what an earlier life of this process leased is not ours. The first one of all makes
-- this the database whose history is known.
with kept as (insert into instance (identity) select instance_now() on conflict do nothing)
insert into replica (name, version) values ($1, $2) returning id;

-- name: beat
-- Still here; and where we are. No beat: somebody declared this replica dead; it must stop claiming and register anew.
select beat, kept, identity, found_at from beat($1, $2);

-- name: leave
-- An orderly goodbye.
update replica set gone_at = clock_timestamp(), gone_reason = $2 where id = $1 and gone_at is null;

-- name: beats
-- Everybody's heartbeat, for a reaper to watch whether it moves.
select id, beat from replica where gone_at is null;

-- name: bury
-- Declares dead the one whose heartbeat we watched not moving; nothing if it has moved since.
update replica set gone_at = clock_timestamp(), gone_reason = 'no heartbeat for a lease'
 where id = $1 and beat = $2 and gone_at is null returning id;

-- name: bury_all
-- For whoever knows that it is alone with this database: all earlier replicas are gone.
update replica set gone_at = clock_timestamp(), gone_reason = 'the only process of this database started anew'
 where gone_at is null;

-- name: reap
-- Leases of the gone without intent go back, intents without result become unknown.
select released, unknown from reap();

-- name: read_clock
-- The clock by which slots are given.
select clock_us();

-- name: claim
-- The fair lane's batches with their slots, leased to us; or what to wait for. In a database that is not the one kept
-- claim is not even called.
select batch_id, epoch, campaign_id, tenant_id, n, slot, now_us, waits_for, cost
  from claim($1, $2, $3, $4, $5, $6, $7, $8) where instance_is_kept()
union all
select null, 0, 0, 0, 0, null, clock_us(), 'recovery', 0 where not instance_is_kept();

-- name: intent
-- Durable word that the batch is about to be posted, after one more look at whether it may be; and what to post.
select verdict, attempt, sender, ids, phones, texts,
       coalesce(pg_sequence_last_value('early_receipt_id_seq'), 0) as early_mark
  from intent($1, $2, $3);

-- name: withdraw
-- Back to its place with the grant returned, as long as nothing left.
select withdraw($1, $2, $3);

-- name: take_back_missed
-- What was leased of an account and missed its slot: back to its place with the grant returned. How many batches.
select take_back_missed($1) where instance_is_kept();

-- name: arrived_late
-- What may have arrived after its slot stays in the limiter's window from then on.
with until as materialized (select coalesce($5, clock_us()) as us)
select us, arrived_late($1, $2, $3, $4, us) from until;

-- name: retake_slot
-- A missed slot for another one, as long as nothing left; null, and the old one given back, where there is none soon.
select retake_slot($1, $2, $3, $4, $5);

-- name: settle_accepted
-- Mitto accepted all of a batch. False after a newer attempt; and the newest early receipt by then, as in intent.
select w.written, coalesce(pg_sequence_last_value('early_receipt_id_seq'), 0) as early_mark
  from (select settle_accepted($1, $2, $3, $4, $5, $6, $7) as written offset 0) w;

-- name: settle_items
-- Mitto's answer item by item: states, ids, credits, counters. As above.
select w.written, coalesce(pg_sequence_last_value('early_receipt_id_seq'), 0) as early_mark
  from (select settle_items($1, $2, coalesce($5, array(select generate_series($3::bigint, $3 + $4::int - 1))),
                            coalesce($6, array_fill(10::smallint, array[$4])), string_to_array($7, E'\n', ''),
                            coalesce($8, array_fill(null::text, array[1])), $9, $10) as written offset 0) w;

-- name: settle_unmapped
-- An answer whose ids may be anybody's of the batch. As above.
select w.written, coalesce(pg_sequence_last_value('early_receipt_id_seq'), 0) as early_mark
  from (select settle_unmapped($1, $2, coalesce($5, array(select generate_series($3::bigint, $3 + $4::int - 1))),
                               coalesce($6, array_fill(10::smallint, array[$4])), string_to_array($7, E'\n', ''),
                               coalesce($8, array_fill(null::text, array[1])), $9, $10) as written offset 0) w;

-- name: settle_batch
-- One outcome for the whole batch; tells what became of it.
select settle_batch($1, $2, $3, $4, $5, $6, $7, $8, $9);

-- name: grant_request
-- One request of the account's limit for a GET: its slot, or when to come back.
select slot, now_us, back_us from grant_request($1, $2, $3);

-- name: give_back_request
-- What grant_request gave and was not used.
select give_back($1, 0, $2, 0);

-- name: apply_receipts
-- Largest state seen wins; ids not known yet are kept.
select updated, kept
  from apply_receipts(string_to_array($1, ',', '')::bigint[], string_to_array($2, E'\n'),
                      string_to_array($3, ',')::smallint[], string_to_array($4, ',', '')::timestamptz[],
                      coalesce($5, array_fill(null::text, array[1])));

-- name: keep_raw_receipts
-- What could not be read, as it came, and once.
insert into raw_receipt (account_id, body, why)
select u.account_id, u.body, min(u.why)
  from unnest($1::bigint[], $2::text[], $3::text[]) with ordinality as u(account_id, body, why, place)
 where not exists (select from raw_receipt k where md5(k.body) = md5(u.body) and k.body = u.body
                                               and k.account_id is not distinct from u.account_id)
 group by u.account_id, u.body order by min(u.place);

-- name: rejoin_receipts
-- Early receipts whose message is known by now.
select rejoin_receipts(string_to_array($1, E'\n'));

-- name: sweep_early_receipts
-- The next early receipts by id, however old: matched, left, or given up after a day.
select last_id, joined, given_up from sweep_early_receipts($1, $2);

-- name: next_raw_receipts
-- Raw receipts to be read again; nobody else reads them meanwhile.
select id, account_id, body, why from raw_receipt
 where id > $1 and id <= $2 order by id limit $3 for update skip locked;

-- name: newest_raw_receipt
-- Where a reading of all of them ends.
select coalesce(max(id), 0) from raw_receipt;

-- name: known_receipts
-- Of each id, in order, whether it is a message's of that account.
select exists (select from provider_message k
                where k.provider_id = u.provider_id and k.account_id = coalesce(u.account_id, k.account_id)) as known
  from unnest($1::bigint[], $2::text[]) with ordinality as u(account_id, provider_id, place) order by u.place;

-- name: end_raw_receipts
-- What was read is gone; of the rest it is said why it cannot be read.
with read_ as (delete from raw_receipt where id = any ($1::bigint[]))
update raw_receipt r set why = u.why
  from unnest($2::bigint[], $3::text[]) as u(id, why) where r.id = u.id and r.why <> u.why;

-- name: accounts
-- What senders need of every account that has a lane.
select a.id, a.provider_id, a.api_key, a.server_error_means, a.requests_per_second, a.max_in_flight, a.paused_reason,
       a.capabilities
  from traffic_account a
 where exists (select from lane where lane.account_id = a.id);

-- name: block_account
-- All replicas wait until then. Never shortens a wait.
update traffic_account
   set blocked_until = greatest(coalesce(blocked_until, '-infinity'), clock_timestamp() + make_interval(secs => $2))
 where id = $1;

-- name: throttle_account
-- All replicas wait until then, never shorter than they would; the ceiling goes down once an event.
select throttle_account($1, $2, $3);

-- name: pause_account
-- Nothing leaves for it until a person lifts it; unless that person has already given it another key than $4.
update traffic_account set paused_reason = $2, paused_detail = $3, updated_at = clock_timestamp()
 where id = $1 and paused_reason is null and (api_key is null or api_key = $4) returning id;

-- name: lower_largest_request
-- Mitto said 413 to n messages: from now on at most half of that.
update traffic_account set largest_request = greatest(1, $2 / 2)
 where id = $1 and largest_request > greatest(1, $2 / 2) returning largest_request;

-- name: pause_batch_campaign
-- The campaign of a batch stops with a reason; tells whether another tenant of the account stands refused as well.
select pause_campaign(b.campaign_id, $2, $3) as paused,
       exists (select from lane l join campaign c on c.id = l.campaign_id
                where l.account_id = b.account_id and l.tenant_id <> b.tenant_id and l.paused
                  and c.status = 'paused' and c.paused_reason = $2) as others
  from batch b where b.id = $1;

-- name: wake_stranded
-- The slow look behind NOTIFY: idle lanes that have something to do, from their start.
with stranded as (
  select l.id from lane l
   where l.idle and not l.closed and not l.paused
     and exists (select from batch b where b.lane_id = l.id and b.state in (0, 1)))
select wake_lane(id, 0) from stranded;

-- name: add_message
-- One message of the priority class, with its hold, in a batch of its own, and its lane awake: all or nothing, whether
-- or not in a transaction. No row: not enough credits.
with held as (
  select id as lane_id, move_credits($1, 'hold', $6::int, 0, null, 'message') as ok
    from lane where account_id = $2 and tenant_id = $1 and class = 0),
message_ as (
  insert into message (campaign_id, id, phone, text, segments)
  select 0, take_message_ids(1), $3::bigint, $4::text, $6::int from held where held.ok returning id),
batch_ as (
  insert into batch (campaign_id, lane_id, tenant_id, account_id, first_id, last_id, n, segments, sender, reference, on_unknown)
  select 0, held.lane_id, $1, $2, message_.id, message_.id, 1, $6::int, $5, $7, $8 from message_, held
  returning first_id, lane_id)
select first_id as id, wake_lane(lane_id, first_id) from batch_;

-- name: wake_lane
-- The lane is non-empty from this message on.
select wake_lane($1, $2);
