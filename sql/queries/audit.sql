-- name: once
-- No number twice in a campaign, no id of Mitto's on two messages, no batch that was answered again after a newer attempt.
select (select count(*) from message where campaign_id <> 0)::bigint as checked,
       coalesce(sum(b.n), 0)::bigint as broken, min(b.example) as example
  from (select count(*) as n, min(format('campaign %s: +%s stands %s times', campaign_id, phone, k)) as example
          from (select campaign_id, phone, count(*) as k from message
                 where campaign_id <> 0 and phone is not null group by 1, 2 having count(*) > 1) x
        union all
        select count(*), min(format('id %s is on %s messages', provider_id, k))
          from (select provider_id, count(*) as k from message_given group by 1 having count(*) > 1) x
        union all
        select count(*), min(format('batch %s attempt %s was answered after a newer one', batch_id, n))
          from attempt where outcome = 'duplicate') b;

-- name: lost
-- Every message is spoken for: by itself, or by a batch that counts it; and no campaign sends with nothing to do.
select (select count(*) from message)::bigint as checked, coalesce(sum(b.n), 0)::bigint as broken,
       min(b.example) as example
  from (select count(*) as n,
               min(format('message %s of campaign %s has no %s', id, campaign_id,
                          case when batch_id is null then 'batch' else 'state' end)) as example
          from message_shown
         where status is null or (own_state is null and batch_state = 10) or (own_state <> 50 and batch_id is null)
        union all
        select count(*), min(format('campaign %s does not exist, and has %s', k.campaign_id, k.what))
          from (select distinct campaign_id, 'messages' as what from message
                union all select distinct campaign_id, 'batches' from batch) k
         where k.campaign_id <> 0 and not exists (select from campaign c where c.id = k.campaign_id)
        union all
        select count(*), min(format('batch %s says %s messages of %s segments, it has %s of %s', id, n, segments, k, s))
          from (select b.id, b.n, b.segments, count(m.id) as k, coalesce(sum(m.segments), 0) as s
                  from batch b
                  left join message m on m.campaign_id = b.campaign_id and m.id between b.first_id and b.last_id
                                     and m.state is null
                 where b.state not in (10, 13) or b.n <> 0
                 group by b.id) x where n <> k or segments <> s
        union all
        select count(*), min(format('batch %s was accepted with %s ids, it has %s messages', id, ids, size))
          from (select b.id, b.last_id - b.first_id + 1 as size,
                       coalesce(cardinality(string_to_array(a.provider_ids, E'\n')), 0) as ids
                  from batch b left join attempt a on a.batch_id = b.id and a.n = b.attempt
                 where b.state = 13) x where ids <> size
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
-- Every campaign's counters equal a count over its messages, those that retention removed included.
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
          left join counted c on c.campaign_id = t.campaign_id
          left join campaign_archive a on a.campaign_id = t.campaign_id
          cross join lateral (
            select array[coalesce(c.queued, 0), coalesce(c.processing, 0),
                         coalesce(c.unknown, 0) + coalesce(a.unknown, 0),
                         coalesce(c.cancelled, 0) + coalesce(a.cancelled, 0),
                         coalesce(c.pending, 0) + coalesce(a.pending, 0),
                         coalesce(c.delivered, 0) + coalesce(a.delivered, 0),
                         coalesce(c.delivery_failed, 0) + coalesce(a.delivery_failed, 0),
                         coalesce(c.refused, 0) + coalesce(a.refused, 0),
                         coalesce(c.skipped, 0) + coalesce(a.skipped, 0),
                         coalesce(c.spent, 0) + coalesce(a.spent, 0)] as found) g) k;

-- name: money
-- Per tenant: the ledger's sums are the balance's figures; what is spent, with what is overdue, is what accepted
-- messages are worth, or were before they were removed. Per campaign, and for a tenant's single messages: what is reserved is what open messages and
-- unexpanded audiences are held for. And an entry names a batch of its own campaign.
with entries as (
  select tenant_id, coalesce(sum(amount) filter (where kind = 'grant'), 0) as granted,
         coalesce(sum(amount) filter (where kind = 'spend'), 0) as spent,
         coalesce(sum(case kind when 'hold' then amount when 'grant' then 0 else -amount end), 0) as reserved
    from ledger group by tenant_id),
decided as (
  select b.tenant_id, b.campaign_id, sum(m.segments) filter (where m.state = 5) as unsure,
         sum(m.segments) filter (where m.state is null or m.state in (10, 11, 20, 30)) as worth
    from batch b join message m on m.campaign_id = b.campaign_id and m.id between b.first_id and b.last_id
   where m.state in (5, 10, 11, 20, 30) or (m.state is null and b.state = 13) group by b.tenant_id, b.campaign_id),
kept as (
  select tenant_id, campaign_id, sum(held) as held
    from (select tenant_id, coalesce(campaign_id, 0) as campaign_id,
                 case kind when 'hold' then amount when 'grant' then 0 else -amount end as held
            from ledger
          union all
          select tenant_id, campaign_id, -segments from batch where state not in (10, 12)
          union all
          select tenant_id, campaign_id, -unsure from decided
          union all
          select tenant_id, campaign_id, -held from expansion) each
   group by tenant_id, campaign_id)
select (select count(*) from credit)::bigint as checked, coalesce(sum(b.n), 0)::bigint as broken,
       min(b.example) as example
  from (select count(*) as n,
               min(format('tenant %s: granted %s spent %s reserved %s; ledger %s %s %s', tenant_id, c.granted, c.spent,
                          c.reserved, e.granted, e.spent, e.reserved)) as example
          from credit c full join entries e using (tenant_id)
         where (c.granted, c.spent, c.reserved)
                 is distinct from (coalesce(e.granted, 0), coalesce(e.spent, 0), coalesce(e.reserved, 0))
        union all
        select count(*), min(format('tenant %s: spent %s and overdue %s; accepted messages are worth %s', tenant_id,
                                    c.spent, c.overdue, a.worth))
          from credit c
          full join (select tenant_id, sum(worth) as worth
                       from (select tenant_id, worth from decided
                             union all select tenant_id, spent from campaign_archive) each
                      group by tenant_id) a using (tenant_id)
         where coalesce(c.spent + c.overdue, 0) <> coalesce(a.worth, 0)
        union all
        select count(*), min(format('tenant %s, campaign %s: the ledger holds %s more than its open messages', tenant_id,
                                    campaign_id, held))
          from kept where held <> 0
        union all
        select count(*), min(format('ledger entry %s is of batch %s, which is not of campaign %s', l.id, l.batch_id,
                                    coalesce(l.campaign_id, 0)))
          from ledger l left join batch b on b.id = l.batch_id and b.campaign_id = coalesce(l.campaign_id, 0)
                                         and b.tenant_id = l.tenant_id
         where l.batch_id is not null and b.id is null) b;

-- name: orphans
-- Ids of Mitto's and messages name each other (where messages are being removed ids go first), and no receipt waits for
-- a message that is known.
select (select count(*) from provider_message)::bigint as checked, coalesce(sum(b.n), 0)::bigint as broken,
       min(b.example) as example
  from (select count(*) as n, min(format('id %s names message %s, which does not have it', p.provider_id, p.message_id))
                 as example
          from provider_message p
          left join message_given m on m.campaign_id = p.campaign_id and m.id = p.message_id
         where m.provider_id is distinct from p.provider_id
        union all
        select count(*), min(format('message %s has an id that nobody can look up', m.id))
          from message_given m left join provider_message p on p.provider_id = m.provider_id
         where p.provider_id is null
           and not exists (select from campaign c where c.id = m.campaign_id and c.removed_at is not null)
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
