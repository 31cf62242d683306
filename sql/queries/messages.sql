-- name: page
-- A page of a campaign's messages by id.
select * from message_shown where campaign_id = $1 and id > $2 order by id limit $3;

-- name: lines
-- A page of a campaign's messages by id without what is long: texts.
select id, phone, status, own_state, reason, detail, segments, provider_id, settled_at, finished_at,
       batch_id, batch_state, batch_done_at
  from message_shown where campaign_id = $1 and id > $2 order by id limit $3;

-- name: page_by_phone
-- The message of a campaign to one number, if it is in the state $3.
select * from message_shown
 where campaign_id = $1 and phone = $2 and ($3::text is null or status = $3) and id > $4;

-- name: counted
-- How many messages of a campaign have a state of their own among these.
select coalesce(sum(
         case when 5 = any ($2::smallint[]) then unknown else 0 end + case when 10 = any ($2) then pending else 0 end
         + case when 20 = any ($2) then delivery_failed else 0 end + case when 30 = any ($2) then delivered else 0 end
         + case when 40 = any ($2) then refused else 0 end + case when 50 = any ($2) then skipped else 0 end), 0)
  from campaign_counter where campaign_id = $1;

-- name: page_by_own_state
-- A page of a campaign's messages that are in one of these states themselves.
with page as (
  select id from message where campaign_id = $1 and id > $2 and state = any ($3::smallint[]) order by id limit $4)
select s.* from page join message_shown s on s.campaign_id = $1 and s.id = page.id order by s.id;

-- name: page_by_batch_state
-- A page of those which a batch in one of these states speaks for.
with page as (
  select m.id
    from batch b
    cross join lateral (
      select id from message
       where campaign_id = b.campaign_id and id between greatest(b.first_id, $2 + 1) and b.last_id and state is null
       order by id limit $4) m
   where b.campaign_id = $1 and b.last_id > $2 and b.state = any ($3::smallint[])
   order by b.first_id, m.id limit $4)
select s.* from page join message_shown s on s.campaign_id = $1 and s.id = page.id order by s.id;

-- name: get
-- One message of a tenant by id alone: of the campaign that the batch before it belongs to, or, where all around it
-- were skipped, of whichever has it.
with place as (
  select coalesce(
    (select b.campaign_id from (select * from batch where first_id <= $2 order by first_id desc limit 1) b
      where b.tenant_id = $1 and exists (select from message m where m.campaign_id = b.campaign_id and m.id = $2)),
    (select c.id from campaign c where c.tenant_id = $1
        and exists (select from message m where m.campaign_id = c.id and m.id = $2) limit 1)) as campaign_id)
select s.* from place join message_shown s on s.campaign_id = place.campaign_id and s.id = $2;

-- name: attempts
-- What was tried with each message, the ranges it was in before a split included; no batch is longer than $3.
select u.id as message_id, a.intent_at, a.outcome, a.status, a.detail
  from unnest($2::bigint[]) as u(id)
  join attempt a on a.campaign_id = $1 and a.first_id between u.id - $3 + 1 and u.id and a.last_id >= u.id
 order by u.id, a.intent_at, a.batch_id, a.n;

-- name: batches
-- A page of a campaign's batches in the order of their messages.
select b.*, (select count(*) from message m
              where m.campaign_id = b.campaign_id and m.id between b.first_id and b.last_id) as size
  from (select * from batch where campaign_id = $1 order by first_id limit $2 offset $3) b
 order by b.first_id;

-- name: batches_total
-- How many batches a campaign has.
select count(*) from batch where campaign_id = $1;

-- name: refresh_page
-- The next messages that wait for a final receipt, round and round; the cursor moves.
with c as (select id, refresh_cursor from campaign where id = $1 for no key update),
after as (
  select p.* from c, pending_messages($1, c.refresh_cursor, 9223372036854775807, $2) p),
before as (
  select p.* from c, pending_messages($1, 0, c.refresh_cursor, $2 - (select count(*) from after)) p),
moved as (
  update campaign set refresh_cursor = coalesce((select max(id) from before), (select max(id) from after), 0)
   where id = $1)
select id, provider_id from after union all select id, provider_id from before;

-- name: by_account
-- The accounts on which Mitto accepted messages.
select account_id, array_agg(provider_id) as provider_ids from provider_message
 where provider_id = any ($1::text[]) group by account_id;
