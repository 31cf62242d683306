-- name: begin_upload
-- A job that bytes will be added to.
insert into import_job (tenant_id, list_id, header) values ($1, $2, $3) returning id;

-- name: add_piece
-- The next bytes of an upload.
with moved as (
  update import_job set size = $2::bigint + length($3::bytea), moved_at = clock_timestamp()
   where id = $1 and status = 'uploading' and size = $2 returning id)
insert into import_piece (job_id, start, data) select id, $2, $3 from moved;

-- name: finish_upload
-- All bytes are here: the job may be taken.
update import_job set status = 'queued', total = $2, moved_at = clock_timestamp()
 where id = $1 and status = 'uploading' returning id;

-- name: drop_upload
-- An upload that came to nothing.
delete from import_job where id = $1 and status = 'uploading';

-- name: drop_stale_uploads
-- Uploads that broke off an hour ago.
delete from import_job where status = 'uploading' and moved_at < clock_timestamp() - interval '1 hour' returning id;

-- name: show_import
-- A job as its tenant sees it.
select id, status, processed, total, created, updated, skipped, errors, created_at, finished_at
  from import_job where tenant_id = $1 and id = $2 and status <> 'uploading';

-- name: claim_import
-- The job that was moved least recently, ours until somebody finds us gone.
with next_ as (
  select j.id from import_job j
   where j.status in ('queued', 'running')
     and (j.owner is null or j.owner = $1
          or not exists (select from replica r where r.id = j.owner and r.gone_at is null))
   order by j.moved_at, j.id limit 1 for no key update skip locked)
update import_job j set status = 'running', owner = $1, moved_at = clock_timestamp()
  from next_, tenant t
 where j.id = next_.id and t.id = j.tenant_id
returning j.id, j.tenant_id, j.list_id, j.size, j.cursor, j.line, j.header, jsonb_array_length(j.errors) as kept,
          t.default_country;

-- name: read_upload
-- Up to $3 bytes of an upload from byte $2 on, as far as one piece has them.
select substring(data from ($2::bigint - start + 1)::int for $3::int) from import_piece
 where job_id = $1 and start <= $2 order by start desc limit 1;

-- name: lock_import
-- Ours, and where we read it; no row: somebody else went on with it.
select id from import_job
 where id = $1 and owner = $2 and cursor = $3 and status = 'running' for no key update;

-- name: import_contacts
-- A block of contacts; how many were new, null if the list is gone.
select import_contacts($1, $2, $3, $4, $5, $6, $7, $8, $9, $10);

-- name: advance_import
-- What a block came to, and where the next one starts.
update import_job
   set cursor = $2, line = $3, header = $4, created = created + $5, updated = updated + $6, skipped = skipped + $7,
       processed = processed + $5 + $6 + $7, errors = errors || $8, moved_at = clock_timestamp(),
       total = case when $9 then processed + $5 + $6 + $7 else greatest(total, processed + $5 + $6 + $7) end,
       status = case when $9 then 'completed' else 'running' end,
       finished_at = case when $9 then clock_timestamp() end
 where id = $1 and status = 'running';

-- name: fail_import
-- The file cannot be read on, and why.
update import_job
   set status = 'failed', errors = errors || $3, finished_at = clock_timestamp(), moved_at = clock_timestamp()
 where id = $1 and owner = $2 and status = 'running' returning id;

-- name: drop_pieces
-- What has been read is not needed any more.
delete from import_piece where job_id = $1;
