-- name: look_up
-- Pages are read along the primary key, and batches looked up, whatever the planner knows of the tables; until the
-- transaction ends.
select set_config(name, 'off', true)
  from unnest('{enable_seqscan, enable_bitmapscan, enable_hashjoin, enable_mergejoin, enable_sort}'::text[]) as u(name);

-- name: owner
-- The tenant of a campaign.
select tenant_id from campaign where id = $1;

-- name: kept
-- The certificate that was kept when the campaign's messages were removed.
select certificate from campaign_archive where campaign_id = $1 and tenant_id = $2;

-- name: removed_at
-- Since when a campaign's messages are not answered any more.
select removed_at from campaign where id = $1;

-- name: moved
-- What the ledger says of a campaign's credits.
select coalesce(sum(amount) filter (where kind = 'hold'), 0)::bigint as held,
       coalesce(sum(amount) filter (where kind = 'spend'), 0)::bigint as spent,
       coalesce(sum(amount) filter (where kind = 'release'), 0)::bigint as released
  from ledger where campaign_id = $1;
