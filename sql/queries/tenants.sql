-- name: insert_account
-- A new traffic account. Mitto's id and the webhook secret are unique.
insert into traffic_account as a (name, provider_id, api_key, requests_per_second, messages_per_second, max_in_flight,
                                  webhook_secret, server_error_means, limit_unit)
values ($1, $2, $3, $4, $5, $6, $7, $8, $9)
returning id, name, provider_id, api_key, requests_per_second, messages_per_second, max_in_flight, webhook_secret,
          server_error_means, largest_request, limit_unit, ceiling_now(a) as ceiling, blocked_until, paused_reason, paused_detail, capabilities,
       created_at, updated_at;

-- name: get_account
-- One traffic account, secrets included.
select id, name, provider_id, api_key, requests_per_second, messages_per_second, max_in_flight, webhook_secret,
       server_error_means, largest_request, limit_unit, ceiling_now(a) as ceiling, blocked_until, paused_reason, paused_detail, capabilities,
       created_at, updated_at
  from traffic_account a where id = $1;

-- name: lock_account
-- Nobody else changes this account before we have.
select from traffic_account where id = $1 for no key update;

-- name: list_accounts
-- A page of traffic accounts, oldest first.
select id, name, provider_id, api_key, requests_per_second, messages_per_second, max_in_flight, webhook_secret,
       server_error_means, largest_request, limit_unit, ceiling_now(a) as ceiling, blocked_until, paused_reason, paused_detail, capabilities,
       created_at, updated_at
  from traffic_account a order by id limit $1 offset $2;

-- name: count_accounts
-- How many there are.
select count(*) from traffic_account;

-- name: update_account
-- What a person sets; what senders learn (blocked, largest request) stays.
update traffic_account
   set name = $2, provider_id = $3, api_key = $4, requests_per_second = $5, messages_per_second = $6,
       max_in_flight = $7, webhook_secret = $8, server_error_means = $9, limit_unit = $10,
       updated_at = clock_timestamp()
 where id = $1;

-- name: learn_capabilities
-- What a probe found out; what it did not find out stays. Only key by key, so that two probes lose nothing.
update traffic_account set capabilities = capabilities || $2 where id = $1 returning capabilities;

-- name: pause_account
-- A person stops an account; the reason of an earlier stop stays.
update traffic_account set paused_reason = 'PAUSED_BY_OPERATOR', updated_at = clock_timestamp()
 where id = $1 and paused_reason is null;

-- name: resume_account
-- A person lets an account send again, whatever had stopped it.
update traffic_account set paused_reason = null, paused_detail = null, blocked_until = null, ceiling = null,
                           ceiling_at = null, updated_at = clock_timestamp()
 where id = $1 and (paused_reason is not null or blocked_until is not null or ceiling is not null);

-- name: lowest_tenant_limit
-- Of the tenants of an account: in messages, or segments, a second. Null: none has one.
select min(messages_per_second) from tenant where account_id = $1;

-- name: wake_account
-- Dispatchers look at this account again, once we commit.
select pg_notify('smsd_lane', $1::bigint::text);

-- name: open_rate
-- A limiter row of something new: nothing was sent yet, so it is open (a missing row means state lost: closed).
insert into rate (scope, id, closed_until) select scope, $2, 0 from unnest($1::smallint[]) as u(scope)
on conflict do nothing;

-- name: insert_tenant
-- A new tenant.
insert into tenant (name, account_id, sender, requests_per_second, messages_per_second, weight, batch_size,
                    subscription, timezone, default_country)
values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)
returning id, name, account_id, sender, requests_per_second, messages_per_second, weight, batch_size, subscription,
          timezone, default_country, created_at, updated_at;

-- name: insert_credit
-- Every tenant has a row of money.
insert into credit (tenant_id) values ($1);

-- name: insert_priority_lane
-- The lane of a tenant's single messages on an account.
insert into lane (account_id, tenant_id, class, campaign_id) values ($1, $2, 0, 0) on conflict do nothing;

-- name: get_tenant
-- One tenant.
select id, name, account_id, sender, requests_per_second, messages_per_second, weight, batch_size, subscription,
       timezone, default_country, created_at, updated_at
  from tenant where id = $1;

-- name: lock_tenant
-- Nobody else changes this tenant, or starts a campaign of it, before we have.
select from tenant where id = $1 for no key update;

-- name: list_tenants
-- A page of tenants, oldest first.
select id, name, account_id, sender, requests_per_second, messages_per_second, weight, batch_size, subscription,
       timezone, default_country, created_at, updated_at
  from tenant order by id limit $1 offset $2;

-- name: count_tenants
-- How many there are.
select count(*) from tenant;

-- name: update_tenant
-- All that a person sets.
update tenant
   set name = $2, account_id = $3, sender = $4, requests_per_second = $5, messages_per_second = $6, weight = $7,
       batch_size = $8, subscription = $9, timezone = $10, default_country = $11, updated_at = clock_timestamp()
 where id = $1;

-- name: has_open_work
-- Whether batches of this tenant, or to come from its campaigns, are bound to its present account.
select exists (select from campaign where tenant_id = $1 and status in ('sending', 'paused'))
    or exists (select from lane l join batch b on b.lane_id = l.id and b.state < 10 where l.tenant_id = $1);

-- name: lock_campaigns
-- After the tenant campaigns come in the order of locks, all of them before what follows from any.
select from campaign where tenant_id = $1 and status in ('sending', 'paused') order by id for no key update;

-- name: lock_expansions
-- Their expansions come next.
select from expansion e join campaign c on c.id = e.campaign_id
 where c.tenant_id = $1 and c.status in ('sending', 'paused') order by e.campaign_id for no key update of e;

-- name: pause_campaigns
-- A tenant that became inactive: what is sending stops with that reason.
select pause_campaign(c.id, 'INACTIVE_SUBSCRIPTION', null)
  from (select id from campaign where tenant_id = $1 and status = 'sending' order by id) c;

-- name: resume_campaigns
-- Active again: exactly what stopped for that reason goes on.
select resume_campaign(c.id, 'INACTIVE_SUBSCRIPTION')
  from (select id from campaign where tenant_id = $1 and status = 'paused'
           and paused_reason = 'INACTIVE_SUBSCRIPTION' order by id) c;

-- name: insert_key
-- A key of which only the hash is kept.
insert into tenant_key (tenant_id, hash, prefix) values ($1, $2, $3) returning id, prefix, created_at, revoked_at;

-- name: list_keys
-- A page of a tenant's keys, revoked ones included, oldest first.
select id, prefix, created_at, revoked_at from tenant_key where tenant_id = $1 order by id limit $2 offset $3;

-- name: count_keys
-- How many there are.
select count(*) from tenant_key where tenant_id = $1;

-- name: revoke_key
-- From now on this key opens nothing; the first time of revoking stays. No row: no such key.
update tenant_key set revoked_at = coalesce(revoked_at, clock_timestamp())
 where tenant_id = $1 and id = $2 returning id;

-- name: authenticate
-- The tenant whose key has this hash and is not revoked.
select t.id, t.name, t.account_id, t.sender, t.requests_per_second, t.messages_per_second, t.weight, t.batch_size,
       t.subscription, t.timezone, t.default_country, t.created_at, t.updated_at
  from tenant_key k join tenant t on t.id = k.tenant_id
 where k.hash = $1 and k.revoked_at is null;

-- name: lock_slot
-- A second request under the same idempotency key waits here until the first has ended.
select pg_advisory_xact_lock(hashtextextended($1, 0));

-- name: stored_answer
-- What a request under this key was answered.
select body_hash, status, answer from idempotency where tenant_id = $1 and route = $2 and key = $3;

-- name: store_answer
-- What took effect, in the transaction in which it did.
insert into idempotency (tenant_id, route, key, body_hash, status, answer) values ($1, $2, $3, $4, $5, $6);

-- name: forget_answers
-- Answers older than two days (one is promised), some at a time.
delete from idempotency where (tenant_id, route, key) in (
  select tenant_id, route, key from idempotency
   where created_at < clock_timestamp() - interval '48 hours' order by created_at limit 5000 for update skip locked);

-- name: lock_signing_keys
-- One at a time makes the first key.
lock table signing_key in share row exclusive mode;

-- name: insert_signing_key
-- The first key, if there is none in use.
insert into signing_key (key) select $1 where not exists (select from signing_key where retired_at is null);

-- name: signing_keys
-- The keys in use, newest first: that signs; both verify.
select key from signing_key where retired_at is null order by id desc limit 2;

-- name: webhook_secrets
-- Who may post receipts: account and secret, where one is set.
select id, webhook_secret from traffic_account where webhook_secret is not null;
