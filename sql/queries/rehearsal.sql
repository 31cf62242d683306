-- name: stage
-- A campaign of one message that waits to be claimed, and everybody whom its way needs: never committed, and under an id
-- that nobody else has, so that no sequence moves.
with me as (select -pg_backend_pid() as id),
account_ as (
  insert into traffic_account (id, name, provider_id) overriding system value
  select id, 'rehearsal', 'rehearsal ' || gen_random_uuid() from me),
tenant_ as (
  insert into tenant (id, name, account_id) overriding system value select id, 'rehearsal', id from me),
rate_ as (                                               -- else its limiters were closed for a second
  insert into rate (scope, id, closed_until) select scope, id, 0 from me, unnest('{1, 3}'::int[]) as scope),
credit_ as (
  insert into credit (tenant_id, granted, reserved) select id, 1, 1 from me),
replica_ as (
  insert into replica (id, name, version) overriding system value select id, 'rehearsal', '' from me),
campaign_ as (
  insert into campaign (id, tenant_id, name, status) overriding system value
  select id, id, 'rehearsal', 'sending' from me),
lane_ as (
  insert into lane (id, account_id, tenant_id, class, campaign_id, cursor, idle) overriding system value
  select id, id, id, 1, id, id, false from me),
message_ as (
  insert into message (campaign_id, id, phone, segments, text) select id, id, 1, 1, '' from me),
batch_ as (
  insert into batch (id, campaign_id, lane_id, tenant_id, account_id, first_id, last_id, n, segments, sender)
  overriding system value select id, id, id, id, id, id, id, 1, 1, '' from me)
select id from me;
