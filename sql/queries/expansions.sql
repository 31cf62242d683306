-- name: claim_expansion
-- The next chunk's expansion, of the tenant least recently served; owned by us until its chunk commits. well_ahead:
-- 100 batches of it wait to be sent.
with next_ as (
  select e.campaign_id from expansion e
   where e.state = 'running' and instance_is_kept()
     and (e.owner is null or e.owner = $1
          or not exists (select from replica r where r.id = e.owner and r.gone_at is null))
   order by (select max(s.served_at) from expansion s where s.tenant_id = e.tenant_id and s.state = 'running'),
            e.served_at, e.campaign_id
   limit 1 for no key update skip locked)
update expansion e set owner = $1, served_at = clock_timestamp()
  from next_, campaign c, tenant t
 where e.campaign_id = next_.campaign_id and c.id = e.campaign_id and t.id = e.tenant_id
returning e.campaign_id, e.tenant_id, e.lane_id, e.source, e.sender, e.template, e.as_of, e.batch_size, e.highest_id,
          e.cursor, e.rereads, e.read, e.of, c.list_ids, c.exclude_list_ids, c.filter_gender, c.filter_age_group,
          c.link_url, t.account_id,
          (select count(*) from (select from batch b where b.lane_id = e.lane_id and b.state = 0 limit 100) waiting)
            = 100 as well_ahead;

-- name: advance_expansion
-- Moves the cursor, if the expansion still runs, is still ours and stands where we read it. No row: drop the chunk.
update expansion
   set cursor = $4, read = read + $5, owner = null, updated_at = clock_timestamp(),
       state = case when $6 then 'done' else 'running' end
 where campaign_id = $1 and owner = $2 and cursor = $3 and state = 'running' and instance_is_kept()
returning campaign_id;

-- name: let_go
-- Gives an expansion up without a chunk.
update expansion set owner = null where campaign_id = $1 and owner = $2;

-- name: already_there
-- Numbers of a chunk that this campaign has already (a contact whose number changed while it was read).
select phone from message where campaign_id = $1 and phone = any ($2::bigint[]);

-- name: take_message_ids
-- A block of ids without gaps.
select take_message_ids($1);

-- name: add_batches
-- The chunk's batches: ranges of messages, contiguous by id.
insert into batch (campaign_id, lane_id, tenant_id, account_id, first_id, last_id, n, segments, sender)
select $1, $2, $3, $4, u.first_id, u.last_id, u.last_id - u.first_id + 1, u.segments, $5
  from unnest($6::bigint[], $7::bigint[], $8::int[]) as u(first_id, last_id, segments);

-- name: add_skipped
-- What the chunk left out, with ids from $2 on and a reason each; and counted.
with skipped as (
  insert into message (campaign_id, id, phone, state, reason, detail, finished_at)
  select $1, $2 + u.place - 1, u.phone, $3, u.reason, u.detail, clock_timestamp()
    from unnest($4::bigint[], $5::text[], $6::text[]) with ordinality as u(phone, reason, detail, place)
  returning 1)
select count_messages($1, 0, 0, 0, 0, 0, (select count(*) from skipped), 0);

-- name: settle_hold
-- Moves the part of the estimated hold that stands for this chunk to its exact figure. held is false where credits do
-- not reach; available: what could be held before that was tried.
select settle_hold($1, $2, $3, $4) as held,
       (select c.granted - c.spent - c.reserved from expansion e, credit_newest(e.tenant_id) c
         where e.campaign_id = $1) as available;

-- name: pause_for_credits
-- Out of credits in the middle: the campaign waits for a top-up. Nothing if there is more than $2 by now.
select pause_for_credits($1, $2, $3);

-- name: pause_as_failed
-- Its audience cannot be read on: a person has to see to it.
select pause_campaign($1, 'EXPANSION_FAILED', $2);
