-- name: take_questions
-- Receipts whose id nobody knows, while something unresolved is old enough to be what they speak of: asked by nobody
-- else until next_ask_at, each a bounded number of times.
with due as (
  select e.id from early_receipt e
   where exists (select from batch where state = 11 or unsure > 0)   -- mostly not, and then no receipt is looked at
     and e.next_ask_at <= clock_timestamp() and e.next_ask_at < 'infinity'
     and e.received_at < clock_timestamp() - make_interval(secs => $2)
     and exists (select from batch b join attempt a on a.batch_id = b.id
                  where (b.state = 11 or b.unsure > 0) and (e.account_id is null or b.account_id = e.account_id)
                    and a.intent_at <= e.received_at)
     and not exists (select from provider_message k where k.provider_id = e.provider_id)
     and not exists (select from unmapped_id u where u.provider_id = e.provider_id)
   order by e.next_ask_at, e.id limit $1 for update of e skip locked)
update early_receipt e
   set asked = e.asked + 1,
       next_ask_at = case when e.asked + 1 >= $3 then 'infinity'
                          else clock_timestamp() + make_interval(secs => least(120, $2 * power(2, e.asked))) end
  from due where e.id = due.id
returning e.provider_id, e.account_id, e.asked;

-- name: take_unmapped
-- Ids from answers out of order, claimed likewise.
with due as (
  select provider_id from unmapped_id where next_ask_at <= clock_timestamp() and next_ask_at < 'infinity'
   order by next_ask_at limit $1 for update skip locked)
update unmapped_id u
   set asked = u.asked + 1,
       next_ask_at = case when u.asked + 1 >= $3 then 'infinity'
                          else clock_timestamp() + make_interval(secs => least(120, $2 * power(2, u.asked))) end
  from due where u.provider_id = due.provider_id
returning u.provider_id, u.account_id, u.asked;

-- name: postpone
-- Not asked after all: no time counted.
with early as (
  update early_receipt set asked = asked - 1, next_ask_at = clock_timestamp() + make_interval(secs => $2)
   where provider_id = $1 and asked > 0)
update unmapped_id set asked = asked - 1, next_ask_at = clock_timestamp() + make_interval(secs => $2)
 where provider_id = $1 and asked > 0;

-- name: conclude
-- What came of asking, for whoever looks; $4: it is not asked again.
with early as (
  update early_receipt set verdict = $2, candidates = $3,
                           next_ask_at = case when $4 then 'infinity' else next_ask_at end where provider_id = $1)
update unmapped_id set verdict = $2 where provider_id = $1;

-- name: accounts
-- Every traffic account as one asks it, and whether something of it is unresolved.
select a.id, a.provider_id, a.api_key, a.server_error_means, a.capabilities,
       exists (select from batch b where b.account_id = a.id and (b.state = 11 or b.unsure > 0)) as unresolved
  from traffic_account a order by a.id;

-- name: candidates
-- Which messages an id may belong to that was created so many seconds ago.
select batch_id, message_id, situation, sender, text_
  from candidates($1, $2, $3, clock_timestamp() - make_interval(secs => $4), $5);

-- name: accept
-- Mitto has this message under this id. False: resolved meanwhile, or the id is somebody's.
select accept_message($1, $2, $3);

-- name: map_id
-- The message of that batch to this number has this id.
select map_id($1, $2);

-- name: resend_asked
-- Unknown single messages whose caller wants them tried again.
select resend_asked($1, $2);

-- name: expose_old
-- Unknown for so long: told once, per campaign.
select campaign_id, tenant_id, n from expose_old($1, $2);

-- name: give_verdict
-- A person's word on unknown messages of a campaign that is locked.
select resolved, early from give_verdict($1, $2, $3, $4, $5, $6);

-- name: undecided
-- Ids of Mitto's that may belong to messages of a campaign and could not be told apart.
select distinct on (e.provider_id) e.provider_id, e.verdict, e.candidates, e.received_at
  from early_receipt e join message m on m.campaign_id = $1 and m.id = any (e.candidates)
 where e.candidates <> '{}' order by e.provider_id, e.received_at limit $2;
