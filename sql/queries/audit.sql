-- name: once
-- No number twice in a campaign, no id of Mitto's on two messages, no batch that was answered again after a newer attempt.
select (select count(*) from message where campaign_id <> 0)::bigint as checked,
       coalesce(sum(b.n), 0)::bigint as broken, min(b.example) as example
  from (select count(*) as n, min(format('campaign %s: +%s stands %s times', campaign_id, phone, k)) as example
          from (select campaign_id, phone, count(*) as k from message
                 where campaign_id <> 0 and phone is not null group by 1, 2 having count(*) > 1) x
        union all
        select count(*), min(format('id %s is on %s messages', provider_id, k))
          from (select provider_id, count(*) as k from message
                 where provider_id is not null group by 1 having count(*) > 1) x
        union all
        select count(*), min(format('batch %s attempt %s was answered after a newer one', batch_id, n))
          from attempt where outcome = 'duplicate') b;

-- name: lost
-- Every message is spoken for: by itself, or by a batch that counts it; and no campaign sends with nothing to do.
select (select count(*) from message)::bigint as checked, coalesce(sum(b.n), 0)::bigint as broken,
       min(b.example) as example
  from (select count(*) as n, min(format('message %s of campaign %s has no state', id, campaign_id)) as example
          from message_shown where status is null or (own_state is null and batch_state = 10)
        union all
        select count(*), min(format('batch %s says %s messages of %s segments, it has %s of %s', id, n, segments, k, s))
          from (select b.id, b.n, b.segments, count(m.id) as k, coalesce(sum(m.segments), 0) as s
                  from batch b
                  left join message m on m.campaign_id = b.campaign_id and m.id between b.first_id and b.last_id
                                     and m.state is null
                 where b.state <> 10 or b.n <> 0
                 group by b.id) x where n <> k or segments <> s
        union all
        select count(*), min(format('campaign %s sends with nothing to do since %s', c.id, c.updated_at))
          from campaign c join expansion e on e.campaign_id = c.id
         where c.status = 'sending' and e.state in ('done', 'stopped')
           and c.updated_at < clock_timestamp() - interval '1 minute'
           and not exists (select from lane l join batch b on b.lane_id = l.id and b.state < 10
                            where l.campaign_id = c.id)
           and not exists (select from batch b where b.campaign_id = c.id
                            and b.done_at > clock_timestamp() - interval '1 minute')) b;

-- name: totals
-- Every campaign's counters equal a count over its messages.
with counted as (
  select campaign_id,
         count(*) filter (where status = 'queued') as queued,
         count(*) filter (where status = 'processing') as processing,
         count(*) filter (where status = 'unknown') as unknown,
         count(*) filter (where status = 'cancelled') as cancelled,
         count(*) filter (where status = 'accepted') as pending,
         count(*) filter (where status = 'delivered') as delivered,
         count(*) filter (where own_state = 20) as delivery_failed,
         count(*) filter (where own_state = 40) as refused,
         count(*) filter (where status = 'skipped') as skipped,
         coalesce(sum(segments) filter (where own_state in (10, 11, 20, 30)), 0)::bigint as spent
    from message_shown where campaign_id <> 0 group by campaign_id)
select count(*) as checked,
       count(*) filter (where wrong) as broken,
       min(format('campaign %s: counters %s, messages %s', campaign_id, said, found)) filter (where wrong) as example
  from (select t.campaign_id, said, found, said is distinct from found as wrong
          from (select campaign_id,
                       array[queued, processing, unknown, cancelled, pending, delivered, delivery_failed, refused,
                             skipped, spent] as said from campaign_totals) t
          left join lateral (select array[queued, processing, unknown, cancelled, pending, delivered,
                                          delivery_failed, refused, skipped, spent] as found_
                               from counted where counted.campaign_id = t.campaign_id) f on true
          cross join lateral (select coalesce(f.found_, array_fill(0::bigint, array[10])) as found) g) k;

-- name: money
-- Per tenant: the ledger's sums are the balance's figures, and what is reserved is what open messages and
-- unexpanded audiences are held for.
with entries as (
  select tenant_id, coalesce(sum(amount) filter (where kind = 'grant'), 0) as granted,
         coalesce(sum(amount) filter (where kind = 'spend'), 0) as spent,
         coalesce(sum(case kind when 'hold' then amount when 'release' then -amount when 'spend' then -amount end), 0)
           as reserved
    from ledger group by tenant_id),
open_ as (
  select tenant_id, sum(segments) as held from batch where state not in (10, 12) group by tenant_id),
unsure as (
  select b.tenant_id, sum(m.segments) as held
    from batch b join message m on m.campaign_id = b.campaign_id and m.id between b.first_id and b.last_id
   where m.state = 5 group by b.tenant_id),
coming as (
  select tenant_id, sum(held) as held from expansion group by tenant_id)
select count(*) as checked, count(*) filter (where wrong) as broken,
       min(format('tenant %s: granted %s spent %s reserved %s; ledger %s %s %s; open messages hold %s', tenant_id,
                  granted, spent, reserved, ledger_granted, ledger_spent, ledger_reserved, held))
         filter (where wrong) as example
  from (select c.tenant_id, c.granted, c.spent, c.reserved, coalesce(e.granted, 0) as ledger_granted,
               coalesce(e.spent, 0) as ledger_spent, coalesce(e.reserved, 0) as ledger_reserved, h.held,
               (c.granted, c.spent, c.reserved, c.reserved)
                 is distinct from (coalesce(e.granted, 0), coalesce(e.spent, 0), coalesce(e.reserved, 0), h.held)
                 as wrong
          from credit c
          left join entries e using (tenant_id)
          left join open_ o using (tenant_id)
          left join unsure u using (tenant_id)
          left join coming x using (tenant_id)
          cross join lateral (select coalesce(o.held, 0) + coalesce(u.held, 0) + coalesce(x.held, 0) as held) h) k;

-- name: orphans
-- Ids of Mitto's and messages name each other, and no receipt waits for a message that is known.
select (select count(*) from provider_message)::bigint as checked, coalesce(sum(b.n), 0)::bigint as broken,
       min(b.example) as example
  from (select count(*) as n, min(format('id %s names message %s, which does not have it', p.provider_id, p.message_id))
                 as example
          from provider_message p
          left join message m on m.campaign_id = p.campaign_id and m.id = p.message_id
         where m.provider_id is distinct from p.provider_id
        union all
        select count(*), min(format('message %s has an id that nobody can look up', m.id))
          from message m left join provider_message p on p.provider_id = m.provider_id
         where m.provider_id is not null and p.provider_id is null
        union all
        select count(*), min(format('a receipt for %s waits since %s', e.provider_id, e.received_at))
          from early_receipt e join provider_message p on p.provider_id = e.provider_id
                                                      and p.account_id = coalesce(e.account_id, p.account_id)
         where e.received_at < clock_timestamp() - interval '1 minute') b;

-- name: leases
-- Every lease belongs to a replica that is alive, or that is being reaped just now.
select (select count(*) from batch where state in (2, 3))::bigint as checked, coalesce(sum(b.n), 0)::bigint as broken,
       min(b.example) as example
  from (select count(*) as n, min(format('batch %s is leased by nobody', id)) as example
          from batch where state in (2, 3) and owner is null
        union all
        select count(*), min(format('batch %s is leased by replica %s, gone since %s', b.id, r.id, r.gone_at))
          from batch b join replica r on r.id = b.owner
         where b.state in (2, 3) and r.gone_at < clock_timestamp() - interval '1 minute'
        union all
        select count(*), min(format('batch %s is open, but its lane %s sleeps', b.id, b.lane_id))
          from batch b join lane l on l.id = b.lane_id
         where b.state in (0, 1) and l.idle and not l.paused and not l.closed
           and b.created_at < clock_timestamp() - interval '1 minute') b;
