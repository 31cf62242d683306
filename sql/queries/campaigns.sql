-- name: create
-- A draft.
insert into campaign (tenant_id, name, text, sender, message_type, link_url, list_ids, exclude_list_ids, filter_gender,
                      filter_age_group)
values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)
returning *;

-- name: get
-- One campaign of a tenant.
select * from campaign where id = $1 and tenant_id = $2;

-- name: keep_tenant
-- A tenant stays as it is until this transaction ends; many may want that at once.
select from tenant where id = $1 for share;

-- name: lock
-- One campaign of a tenant, and nobody else decides about it until this transaction ends.
select * from campaign where id = $1 and tenant_id = $2 for no key update;

-- name: keep_lists
-- Those of the lists that a tenant has; they cannot be deleted before we are done.
select id from contact_list where tenant_id = $1 and id = any ($2::bigint[]) order by id for key share;

-- name: list_page
-- Newest first, each with what its counters say of the messages that left.
select c.*, k.pending, k.delivered, k.failed
  from campaign c
  cross join lateral (
    select coalesce(sum(pending), 0)::bigint as pending, coalesce(sum(delivered), 0)::bigint as delivered,
           coalesce(sum(refused + delivery_failed), 0)::bigint as failed
      from campaign_counter where campaign_id = c.id) k
 where c.tenant_id = $1 and ($2::text is null or strpos(lower(c.name), lower($2)) > 0)
   and ($3::text is null or c.status = $3)
 order by c.id desc limit $4 offset $5;

-- name: list_total
-- How many there are of what list_page shows.
select count(*) from campaign c
 where c.tenant_id = $1 and ($2::text is null or strpos(lower(c.name), lower($2)) > 0)
   and ($3::text is null or c.status = $3);

-- name: stats
-- What list_page shows of one campaign's messages.
select coalesce(sum(pending), 0)::bigint as pending, coalesce(sum(delivered), 0)::bigint as delivered,
       coalesce(sum(refused + delivery_failed), 0)::bigint as failed
  from campaign_counter where campaign_id = $1;

-- name: update
-- Changes what was not sent yet.
update campaign
   set name = $2, text = $3, sender = $4, message_type = $5, link_url = $6, list_ids = $7, exclude_list_ids = $8,
       filter_gender = $9, filter_age_group = $10, updated_at = clock_timestamp()
 where id = $1 and status in ('draft', 'scheduled')
returning *;

-- name: delete
-- Removes what was not sent yet, with its recipients.
with gone as (delete from campaign where id = $1 and status in ('draft', 'scheduled') returning id),
recipients as (delete from recipient using gone where recipient.campaign_id = gone.id)
select id from gone;

-- name: highest_recipient
-- The last recipient uploaded for a campaign; null where there is none.
select max(id) from recipient where campaign_id = $1;

-- name: begin
-- Sends: status, lane and the expansion's snapshot at once. No row: somebody else did, or it ended.
with begun as (
  update campaign set status = 'sending', started_at = clock_timestamp(), updated_at = clock_timestamp()
   where id = $1 and status in ('draft', 'scheduled') returning id, tenant_id),
lane_ as (
  insert into lane (account_id, tenant_id, class, campaign_id) select $2, tenant_id, 1, id from begun
  returning id, campaign_id),
expansion_ as (
  insert into expansion (campaign_id, tenant_id, lane_id, source, sender, template, as_of, batch_size, highest_id, of,
                         held)
  select begun.id, begun.tenant_id, lane_.id, $3, $4, $5, $6, $7, $8, $9, $10
    from begun join lane_ on lane_.campaign_id = begun.id
  returning campaign_id)
select pg_notify('smsd_expansion', campaign_id::text) from expansion_;

-- name: pause
-- Stops expansion and lane; what is being posted is recorded all the same. False: it was not sending.
select pause_campaign($1, $2, null);

-- name: keep_paused
-- Paused by something else: from now on by this reason.
update campaign set paused_reason = $2, paused_detail = null, updated_at = clock_timestamp()
 where id = $1 and status = 'paused' and paused_reason is distinct from $2;

-- name: resume
-- Goes on where it stopped, whatever stopped it.
select resume_campaign($1, null);

-- name: cancel
-- What has not left will not leave; its holds come back at once. False: it had ended, or never begun.
select cancel_campaign($1);

-- name: retry_failed
-- Queues again what was certainly refused; how many. Null: the credits for it are short.
select retried, required, held from retry_failed($1);

-- name: finish
-- Ends the campaigns that have nothing left to do.
select finish_campaigns();

-- name: progress
-- The campaign, its parts and its expansion, in one snapshot.
select c.*, t.queued, t.processing, t.pending, t.delivered, t.delivery_failed, t.refused, t.unknown, t.cancelled, t.skipped,
       t.spent, e.state as expansion_state, coalesce(e.read, 0) as read, coalesce(e.of, 0) as of,
       clock_timestamp() as now
  from campaign c
  join campaign_totals t on t.campaign_id = c.id
  left join expansion e on e.campaign_id = c.id
 where c.id = $1 and c.tenant_id = $2;

-- name: limited_by
-- Which limit a campaign's messages stand at: what was granted in the last second, against what may be.
with used as (
  select a.paused_reason, wait_until(a.blocked_until, clock_us()) > clock_us() as blocked, r.scope, rate_used(r) as n,
         case r.scope when 1 then limit_now(a.requests_per_second, a.ceiling, a.ceiling_at) when 2 then a.messages_per_second
                      when 3 then t.requests_per_second when 4 then t.messages_per_second end as most
    from expansion e
    join lane l on l.id = e.lane_id
    join traffic_account a on a.id = l.account_id
    join tenant t on t.id = e.tenant_id
    cross join lateral (values (1, a.id), (2, a.id), (3, t.id), (4, t.id)) as w(scope, id)
    left join lateral rate_newest(w.scope, w.id) r on true
   where e.campaign_id = $1)
select case when bool_or(paused_reason is not null) then 'account_paused'
            when bool_or(blocked) then 'account_throttled'
            when bool_or(scope in (3, 4) and n >= 0.9 * most) then 'tenant_limit'
            when bool_or(scope in (1, 2) and n >= 0.9 * most) then 'account_limit' end
  from used;
