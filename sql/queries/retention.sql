-- name: unfinished
-- Campaigns whose messages are being removed, and how far that has come.
select campaign_id, tenant_id, stage from campaign_archive where stage <> 'done' and campaign_id > $1
 order by campaign_id limit 1;

-- name: begin_removal
-- The next campaign that ended $1 seconds ago: from now on its messages are not answered any more.
select begin_removal($1);

-- name: close_piece
-- The next messages of it do not move any more. False: that was all, or it is another's turn.
select close_piece($1, $2);

-- name: stage
-- How far the removal of a campaign's messages has come.
select stage from campaign_archive where campaign_id = $1 and tenant_id = $2;

-- name: keep_certificate
-- Keeps the certificate. False: something moved while it was made.
select keep_certificate($1, $2, $3);

-- name: remove_piece
-- The next messages are gone. False: that was all, or it is another's turn.
select remove_piece($1, $2);

-- name: remove_singles
-- Single messages older than $1 seconds, from id $2 on.
select until_id, removed from remove_singles($1, $2, $3);

-- name: remove_early_receipts
-- Receipts for which no message was found in that time.
delete from early_receipt where id in (
  select id from early_receipt where received_at < clock_timestamp() - make_interval(secs => $1)
   order by received_at limit $2 for update skip locked);

-- name: remove_raw_receipts
-- What could not be read in that time; looked for among the oldest.
delete from raw_receipt where id in (
  select id from (select id, received_at from raw_receipt order by id limit $2) oldest
   where received_at < clock_timestamp() - make_interval(secs => $1));

-- name: remove_imports
-- Reports of imports, with the lines that could not be read; looked for among the oldest.
delete from import_job where id in (
  select id from (select id, finished_at from import_job order by id limit $2) oldest
   where finished_at < clock_timestamp() - make_interval(secs => $1));

-- name: remove_unmapped_ids
-- Ids of answers that nobody could tell apart in that time.
delete from unmapped_id where provider_id in (
  select provider_id from unmapped_id where created_at < clock_timestamp() - make_interval(secs => $1) limit $2);
