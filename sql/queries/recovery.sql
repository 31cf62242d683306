-- name: look_at_instance
-- Whether work may go on in this database; what is to be done when it is another one than was kept, is done first.
select look_at_instance();

-- name: registered_beats
-- What these registrations' heartbeats stand at here. A registration that was forgotten has no row.
select id, beat from replica where id = any ($1::bigint[]);

-- name: compare
-- Attempts that were made, as the database has them: behind (it is forgotten), open (its result is), known.
select u.batch_id, u.attempt,
       case when b.id is null or b.attempt < u.attempt then 'behind'
            when b.attempt = u.attempt and b.state in (3, 11) then 'open' else 'known' end as found
  from unnest($1::bigint[], $2::int[]) as u(batch_id, attempt) left join batch b on b.id = u.batch_id;

-- name: reassert
-- Brings back what the database forgot of one attempt; idempotent.
select reassert($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13);

-- name: raise_epochs
-- Leases that were handed out and forgotten: no later one may have their number.
update batch b set epoch = u.epoch from unnest($1::bigint[], $2::int[]) as u(batch_id, epoch)
 where b.id = u.batch_id and b.epoch < u.epoch and b.state in (0, 1, 2);

-- name: assert_instance
-- This replica has said all that it knows. True: work may go on.
select assert_instance($1, $2, $3, $4);

-- name: waiting
-- Why nobody claims: the database kept and the one found, since when, and who is waited for. No row: work goes on.
select i.identity as kept, instance_now() as found, coalesce(i.found_at, clock_timestamp()) as since, i.doubted,
       array(select r.id from replica r where r.id = any (i.awaited) and r.id <> all (i.asserted)
                and r.gone_at is null order by 1) as awaited,
       array(select u.id from unnest(i.awaited) as u(id) where u.id <> all (i.asserted)
                and not exists (select from replica r where r.id = u.id and r.gone_at is null) order by 1) as gone,
       i.asserted
  from instance i where not instance_is_kept();

-- name: under_way
-- Campaigns that a person has to think of, with what has not left and what is unknown.
select c.id, c.name, c.status, t.queued, t.processing, t.unknown, coalesce(e.of - e.read, 0) as unread
  from campaign c
  join campaign_totals t on t.campaign_id = c.id
  left join expansion e on e.campaign_id = c.id and e.state in ('running', 'paused')
 where c.status in ('sending', 'paused') order by c.id;

-- name: living
-- Replicas that are not gone.
select count(*) from replica where gone_at is null;

-- name: accept_instance
-- A person decides that this history counts; $1: what is queued becomes unknown.
select unknown, paused from accept_instance($1);
