-- name: balance
-- A tenant's money as it stands: balance = granted - spent, of which some may be reserved.
select granted - spent as balance, reserved from credit_newest($1);

-- name: move
-- One entry in the ledger and what follows from it: grant | hold | spend | release. False: a hold beyond what is
-- available, or no such tenant; then nothing moved.
select move_credits($1, $2, $3, $4, null, $5);

-- name: payable
-- How much of what is overdue can be paid now; the row stays locked.
select least(overdue, granted - spent - reserved) from credit where tenant_id = $1 for no key update;

-- name: pay_overdue
-- That much less is overdue.
update credit set overdue = overdue - $2 where tenant_id = $1 and overdue >= $2;

-- name: lock_campaigns
-- Campaigns come before credits in the order of locks.
select from campaign where tenant_id = $1 and status = 'paused' and paused_reason = 'INSUFFICIENT_CREDITS'
 order by id for no key update;

-- name: lock_expansions
-- Their expansions come next.
select from expansion e join campaign c on c.id = e.campaign_id
 where c.tenant_id = $1 and c.status = 'paused' and c.paused_reason = 'INSUFFICIENT_CREDITS'
 order by e.campaign_id for no key update of e;

-- name: resume_campaigns
-- What stopped for want of credits tries again.
select resume_campaign(c.id, 'INSUFFICIENT_CREDITS')
  from (select c.id from campaign c join tenant t on t.id = c.tenant_id and t.subscription = 'active'
         where c.tenant_id = $1 and c.status = 'paused' and c.paused_reason = 'INSUFFICIENT_CREDITS'
         order by c.id) c;

-- name: leave_to_subscription
-- Credits are there but the tenant is inactive: its becoming active is what they wait for now.
update campaign c set paused_reason = 'INACTIVE_SUBSCRIPTION', updated_at = clock_timestamp()
  from tenant t
 where c.tenant_id = $1 and t.id = $1 and t.subscription = 'inactive'
   and c.status = 'paused' and c.paused_reason = 'INSUFFICIENT_CREDITS';

-- name: list_ledger
-- A page of a tenant's ledger, newest first.
select id, at, kind, amount, campaign_id, batch_id, reason, balance_after, reserved_after
  from ledger where tenant_id = $1 order by id desc limit $2 offset $3;

-- name: count_ledger
-- How many entries there are.
select count(*) from ledger where tenant_id = $1;
