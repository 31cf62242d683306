-- oldest code: 3
-- What is over goes: messages of campaigns that ended long ago, old single messages, and a person who asks for it.
-- Totals, money and certificates stay. docs/retention.md tells why it is done so.

-- From then on its messages are not answered any more, and nothing of it can be sent again.
alter table campaign add column removed_at timestamptz,
  add constraint campaign_removed check (removed_at is null or status in ('completed', 'failed', 'cancelled')) not valid;
create index campaign_over on campaign (finished_at) where removed_at is null and finished_at is not null;

-- What stays of messages that were removed, summed: of a campaign (with its certificate), or, where campaign_id is 0,
-- of a tenant's single messages. stage: closing (ids of Mitto's go, so that nothing moves any more) | closed |
-- removing (the certificate is kept) | done. cursor: how far the stage has come, a message id.
create table campaign_archive (
  campaign_id      bigint not null,
  tenant_id        bigint not null,
  stage            text not null default 'closing' check (stage in ('closing', 'closed', 'removing', 'done')),
  cursor           bigint not null default 0,
  batches          bigint not null default 0,
  cancelled        bigint not null default 0,
  pending          bigint not null default 0,
  delivered        bigint not null default 0,
  delivery_failed  bigint not null default 0,
  refused          bigint not null default 0,
  unknown          bigint not null default 0,
  skipped          bigint not null default 0,
  spent            bigint not null default 0,
  certificate      jsonb,
  primary key (campaign_id, tenant_id)
) with (fillfactor = 50);
create index campaign_archive_open on campaign_archive (campaign_id) where stage <> 'done';

-- Freed pages are used again; giving them back to the disk would take a lock under which nobody reads. Tables from
-- which nothing but retention takes away are looked after before a fifth of them is empty.
alter table message set (vacuum_truncate = false);
alter table batch set (vacuum_truncate = false);
alter table attempt set (vacuum_truncate = false, autovacuum_vacuum_scale_factor = 0.05);
alter table provider_message set (vacuum_truncate = false, autovacuum_vacuum_scale_factor = 0.05);
alter table ledger set (vacuum_truncate = false, autovacuum_vacuum_scale_factor = 0.05);

-- Single messages by number, for a person who wants to be forgotten; those of campaigns have message_phone.
create index message_single on message (phone) where campaign_id = 0;

-- Batches that were removed count on in the archive.
create or replace view campaign_totals as
select c.id as campaign_id, c.tenant_id,
       b.queued, b.processing, b.cancelled + coalesce(a.cancelled, 0) as cancelled,
       b.batches + coalesce(a.batches, 0) as batches,
       b.unknown + k.unknown as unknown,
       k.pending, k.delivered, k.delivery_failed, k.refused, k.skipped, k.spent
  from campaign c
  left join campaign_archive a on a.campaign_id = c.id and a.tenant_id = c.tenant_id
  cross join lateral (
    select coalesce(sum(n) filter (where state in (0, 1)), 0)::bigint as queued,
           coalesce(sum(n) filter (where state in (2, 3)), 0)::bigint as processing,
           coalesce(sum(n) filter (where state = 11), 0)::bigint as unknown,
           coalesce(sum(n) filter (where state = 12), 0)::bigint as cancelled,
           count(*) as batches
      from batch where batch.campaign_id = c.id) b
  cross join lateral (
    select coalesce(sum(pending), 0)::bigint as pending, coalesce(sum(delivered), 0)::bigint as delivered,
           coalesce(sum(delivery_failed), 0)::bigint as delivery_failed,
           coalesce(sum(refused), 0)::bigint as refused, coalesce(sum(unknown), 0)::bigint as unknown,
           coalesce(sum(skipped), 0)::bigint as skipped, coalesce(sum(spent), 0)::bigint as spent
      from campaign_counter where campaign_counter.campaign_id = c.id) k;

-- ------------------------------------------------------------------------------------------- money

-- Entries of one campaign, or of a tenant's single messages, become one entry a kind, with the reason `retention`.
alter table ledger
  drop constraint ledger_spend, drop constraint ledger_release,
  add constraint ledger_spend check (kind <> 'spend' or batch_id is not null or campaign_id is not null
                                     or (reason is not null and reason in ('overdue', 'retention'))) not valid,
  add constraint ledger_release check (kind <> 'release' or campaign_id is not null or batch_id is not null
                                       or (reason is not null and reason = 'retention')) not valid;
create unique index ledger_folded on ledger (tenant_id, coalesce(campaign_id, 0), kind)
  where reason = 'retention' and kind <> 'grant';
create index ledger_of_singles on ledger (batch_id, at)
  where campaign_id is null and kind <> 'grant' and reason is distinct from 'retention';

-- Puts these entries together: sums by tenant, campaign and kind stay what they were, at any moment.
create function fold_ledger(p_ids bigint[]) returns void language plpgsql set plan_cache_mode = force_generic_plan as $$
declare gone ledger[];
begin
  if cardinality(p_ids) = 0 then return; end if;
  perform set_config('smsd.retention', 'on', true);
  with d as (delete from ledger l where l.id = any (p_ids) returning l)
  select array_agg(d.l order by (d.l).id) into gone from d;
  insert into ledger as l (id, tenant_id, at, kind, amount, campaign_id, reason, balance_after, reserved_after)
  overriding system value
  select max(id), tenant_id, max(at), kind, sum(amount), campaign_id, 'retention',
         (array_agg(balance_after order by id desc))[1], (array_agg(reserved_after order by id desc))[1]
    from unnest(gone) group by tenant_id, campaign_id, kind
  on conflict (tenant_id, coalesce(campaign_id, 0), kind) where reason = 'retention' and kind <> 'grant'
    do update set amount = l.amount + excluded.amount, at = greatest(l.at, excluded.at),
                  balance_after = excluded.balance_after, reserved_after = excluded.reserved_after;
  perform set_config('smsd.retention', '', true);
end $$;

-- Up to p_most entries of a campaign at once; how many there were.
create function fold_campaign(p_campaign bigint, p_most int) returns bigint language plpgsql
set plan_cache_mode = force_generic_plan set enable_seqscan = off as $$
declare ids bigint[];
begin
  ids := array(select id from ledger where campaign_id = p_campaign and reason is distinct from 'retention' limit p_most);
  perform fold_ledger(ids);
  return cardinality(ids);
end $$;

-- ------------------------------------------------------------------------------------------- campaigns

-- One replica at a time, and only where the database is the one that all work on.
create function may_remove() returns boolean language sql volatile as
$$ select instance_is_kept() and pg_try_advisory_xact_lock(7276306) $$;

-- The next campaign that ended so long ago. Null: there is none, or it is somebody else's turn.
create function begin_removal(p_seconds float8) returns bigint language plpgsql as $$
declare c record;
begin
  if not may_remove() then return null; end if;
  for c in
    select id, tenant_id from campaign
     where removed_at is null and finished_at < clock_timestamp() - make_interval(secs => p_seconds)
       and status in ('completed', 'failed', 'cancelled')
     order by finished_at for no key update skip locked
  loop
    -- What was being posted when it was cancelled has its result first.
    continue when exists (select from lane l join batch b on b.lane_id = l.id and b.state < 10
                           where l.campaign_id = c.id);
    update campaign set removed_at = clock_timestamp() where id = c.id;
    insert into campaign_archive (campaign_id, tenant_id) values (c.id, c.tenant_id);
    return c.id;
  end loop;
  return null;
end $$;

-- Where a piece of p_most messages after p_after ends: with a whole batch. Null: there are none.
create function piece_end(p_campaign bigint, p_after bigint, p_most int) returns bigint language sql stable as $$
  select greatest(x.id, (select b.last_id from batch b where b.campaign_id = p_campaign and b.first_id <= x.id
                          order by b.first_id desc limit 1))
    from (select max(id) as id
            from (select id from message where campaign_id = p_campaign and id > p_after order by id limit p_most) y) x
   where x.id is not null
$$;

-- Nothing changes the next p_most messages any more: receipts do not find them, and results, evidence and verdicts on
-- unknown ones come too late. They stay unknown, with their hold, until they go. False: no more to do, or not now.
create function close_piece(p_campaign bigint, p_most int) returns boolean language plpgsql
set plan_cache_mode = force_generic_plan
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off as $$
declare after_ bigint; until_ bigint;
begin
  if not may_remove() then return false; end if;
  select a.cursor into after_ from campaign_archive a where a.campaign_id = p_campaign and a.stage = 'closing';
  if not found then return false; end if;
  until_ := piece_end(p_campaign, after_, p_most);
  if until_ is null then
    delete from lane where campaign_id = p_campaign;     -- no posting can be asserted for it any more
    update campaign_archive set stage = 'closed', cursor = 0 where campaign_id = p_campaign and stage = 'closing';
    return false;
  end if;
  perform expose_unknown(b.id) from (
    select id from batch where campaign_id = p_campaign and first_id > after_ and first_id <= until_ and state = 11
     order by id) b;
  update batch set unsure = 0
   where campaign_id = p_campaign and first_id > after_ and first_id <= until_ and unsure > 0;
  update attempt set outcome = 'expired', ended_at = coalesce(ended_at, clock_timestamp())
   where campaign_id = p_campaign and first_id > after_ and first_id <= until_
     and outcome is distinct from 'duplicate' and outcome is distinct from 'expired';
  -- By arrays: of a join the planner may read the wrong side whole.
  delete from unmapped_id where batch_id = any (array(
    select id from batch where campaign_id = p_campaign and first_id > after_ and first_id <= until_));
  delete from provider_message where provider_id = any (array(
    select provider_id from message
     where campaign_id = p_campaign and id > after_ and id <= until_ and provider_id is not null));
  update campaign_archive set cursor = until_ where campaign_id = p_campaign;
  return true;
end $$;

-- Keeps the certificate of a campaign in which nothing moves any more. False: it says otherwise than the counters do,
-- so something did move while it was made.
create function keep_certificate(p_campaign bigint, p_totals bigint[], p_certificate jsonb) returns boolean
language sql as $$
  with kept as (
    update campaign_archive a set stage = 'removing', cursor = 0, certificate = p_certificate
      from campaign_totals t
     where a.campaign_id = p_campaign and a.stage = 'closed' and t.campaign_id = p_campaign
       and p_totals = array[t.queued, t.processing, t.pending, t.delivered, t.delivery_failed, t.refused, t.unknown,
                            t.cancelled, t.skipped, t.spent]
    returning 1)
  select exists (select from kept)
$$;

-- Takes away the next p_most messages with their batches, attempts and entries in the ledger: what they came to is
-- added to the archive, and what is held for unknown ones comes back. After them goes what was uploaded for the
-- campaign. False: no more to do, or not now.
create function remove_piece(p_campaign bigint, p_most int) returns boolean language plpgsql
set plan_cache_mode = force_generic_plan
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off as $$
declare a campaign_archive; until_ bigint; worth bigint; n_batches bigint;
begin
  if not may_remove() then return false; end if;
  select * into a from campaign_archive x where x.campaign_id = p_campaign and x.stage = 'removing' for no key update;
  if not found then return false; end if;
  if fold_campaign(p_campaign, p_most) >= p_most then return true; end if;
  until_ := piece_end(p_campaign, a.cursor, p_most);
  if until_ is not null then
    with gone as (
      delete from message where campaign_id = p_campaign and id > a.cursor and id <= until_ returning state, segments),
    counted as (
      select count(*) filter (where state is null) as cancelled,
             count(*) filter (where state in (10, 11)) as pending, count(*) filter (where state = 30) as delivered,
             count(*) filter (where state = 20) as delivery_failed, count(*) filter (where state = 40) as refused,
             count(*) filter (where state = 5) as unknown, count(*) filter (where state = 50) as skipped,
             coalesce(sum(segments) filter (where state in (10, 11, 20, 30)), 0) as spent,
             coalesce(sum(segments) filter (where state = 5), 0) as worth from gone),
    summed as (
      update campaign_archive x
         set cursor = until_, cancelled = x.cancelled + k.cancelled, pending = x.pending + k.pending,
             delivered = x.delivered + k.delivered, delivery_failed = x.delivery_failed + k.delivery_failed,
             refused = x.refused + k.refused, unknown = x.unknown + k.unknown, skipped = x.skipped + k.skipped,
             spent = x.spent + k.spent
        from counted k where x.campaign_id = p_campaign)
    select counted.worth into worth from counted;
    delete from attempt where campaign_id = p_campaign and first_id > a.cursor and first_id <= until_;
    delete from batch where campaign_id = p_campaign and first_id > a.cursor and first_id <= until_;
    get diagnostics n_batches = row_count;
    update campaign_archive set batches = batches + n_batches where campaign_id = p_campaign;
    perform move_credits(a.tenant_id, 'release', worth, p_campaign, null, 'expired');
    perform fold_campaign(p_campaign, p_most);
    return true;
  end if;
  delete from recipient where campaign_id = p_campaign and id = any (array(
    select id from recipient where campaign_id = p_campaign order by id limit p_most));
  if found then return true; end if;
  delete from audience_size where kind = 2 and id = p_campaign;
  update campaign_archive set stage = 'done' where campaign_id = p_campaign;
  return false;
end $$;

-- ------------------------------------------------------------------------------------------- single messages

-- The next p_most single messages after id p_after that are older than that and not on their way: gone with all that
-- names them. What is held for unknown ones comes back. until_id null: there are none, or not now.
create function remove_singles(p_seconds float8, p_after bigint, p_most int, out until_id bigint, out removed bigint)
language plpgsql set plan_cache_mode = force_generic_plan
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off as $$
declare before_ timestamptz := clock_timestamp() - make_interval(secs => p_seconds); gone bigint[]; ids bigint[]; k record;
begin
  removed := 0;
  if not may_remove() then return; end if;
  select max(x.first_id) into until_id
    from (select first_id, created_at from batch
           where campaign_id = 0 and first_id > p_after order by first_id limit p_most) x
   where x.created_at < before_;
  if until_id is null then return; end if;
  gone := array(
    select b.id from batch b
     where b.campaign_id = 0 and b.first_id > p_after and b.first_id <= until_id and b.state in (10, 11, 12)
       and greatest(b.created_at, b.done_at) < before_
       and not exists (select from attempt t where t.batch_id = b.id and t.ended_at >= before_)
     order by b.id for no key update skip locked);
  for k in
    select b.tenant_id, min(b.id) as batch_id, count(*) as n, count(*) filter (where b.state = 12) as cancelled,
           count(*) filter (where m.state in (10, 11)) as pending, count(*) filter (where m.state = 30) as delivered,
           count(*) filter (where m.state = 20) as delivery_failed, count(*) filter (where m.state = 40) as refused,
           count(*) filter (where m.state = 5 or (m.state is null and b.state = 11)) as unknown,
           coalesce(sum(m.segments) filter (where m.state in (10, 11, 20, 30)), 0) as spent,
           coalesce(sum(m.segments) filter (where m.state = 5 or (m.state is null and b.state = 11)), 0) as worth
      from batch b
      cross join lateral (select state, segments from message
                           where campaign_id = 0 and id = b.first_id for no key update) m
     where b.id = any (gone) group by b.tenant_id order by b.tenant_id
  loop
    insert into campaign_archive as a (campaign_id, tenant_id, stage, batches, cancelled, pending, delivered,
                                       delivery_failed, refused, unknown, spent)
    values (0, k.tenant_id, 'done', k.n, k.cancelled, k.pending, k.delivered, k.delivery_failed, k.refused,
            k.unknown, k.spent)
    on conflict (campaign_id, tenant_id) do update
       set batches = a.batches + excluded.batches, cancelled = a.cancelled + excluded.cancelled,
           pending = a.pending + excluded.pending, delivered = a.delivered + excluded.delivered,
           delivery_failed = a.delivery_failed + excluded.delivery_failed, refused = a.refused + excluded.refused,
           unknown = a.unknown + excluded.unknown, spent = a.spent + excluded.spent;
    perform move_credits(k.tenant_id, 'release', k.worth, 0, k.batch_id, 'expired');
    removed := removed + k.n;
  end loop;
  delete from unmapped_id where batch_id = any (gone);
  ids := array(select first_id from batch where id = any (gone));
  delete from provider_message where provider_id = any (array(
    select provider_id from message where campaign_id = 0 and id = any (ids) and provider_id is not null));
  delete from message where campaign_id = 0 and id = any (ids);
  -- Holds of single messages name no batch: they go by their age, and sums stay what they are.
  perform fold_ledger(array(
    select id from ledger where campaign_id is null and kind <> 'grant' and reason is distinct from 'retention'
       and batch_id = any (gone)));
  perform fold_ledger(array(
    select id from ledger where campaign_id is null and kind <> 'grant' and reason is distinct from 'retention'
       and batch_id is null and at < before_ order by at limit 2 * p_most));
  delete from attempt where batch_id = any (gone);
  delete from batch where id = any (gone);
end $$;

-- ------------------------------------------------------------------------------------------- erasure

-- How often what was read of an audience had to be forgotten.
alter table expansion add column rereads int not null default 0;

-- Forgets a contact of a tenant: the person's row, lists, uploads, numbers, names and texts. Messages stay as what they
-- cost and came to, under a number that never was one and that nobody can tell the person by; it is kept as opted out,
-- so that nothing that opens an old message again can send it. What was waiting is not sent. An opt-out of the real
-- number stays: it is what keeps the person from being texted after the next upload.
-- outcome: erased | absent | importing (an upload may name the person) | in_flight (being posted just now)
create function erase_contact(p_tenant bigint, p_contact bigint, out outcome text, out messages bigint)
language plpgsql set plan_cache_mode = force_generic_plan
set enable_seqscan = off set enable_hashjoin = off set enable_mergejoin = off as $$
declare
  number bigint; alias_ bigint; campaigns bigint[]; ids bigint[]; seen bigint[] := '{}'; batches bigint[]; r record;
  waiting_in bigint[] := '{}'; waiting_batch bigint[] := '{}'; waiting_worth bigint[] := '{}';
begin
  messages := 0;
  -- A chunk that was read before and is not written yet is read again, without the person.
  perform from expansion where tenant_id = p_tenant and state in ('running', 'paused')
    order by campaign_id for no key update;
  update expansion set owner = null, rereads = rereads + 1
   where tenant_id = p_tenant and state in ('running', 'paused');
  select phone into number from contact where tenant_id = p_tenant and id = p_contact for update;
  if not found then outcome := 'absent'; return; end if;
  if exists (select from import_job where tenant_id = p_tenant and status in ('queued', 'running')) then
    outcome := 'importing'; return;
  end if;
  select coalesce(array_agg(x.campaign_id order by x.id), '{}'), coalesce(array_agg(x.id order by x.id), '{}')
    into campaigns, ids
    from (select m.campaign_id, m.id from campaign c
            join message m on m.campaign_id = c.id and m.campaign_id <> 0 and m.phone = number
           where c.tenant_id = p_tenant
          union all
          select 0, m.id from message m join batch b on b.first_id = m.id and b.tenant_id = p_tenant
           where m.campaign_id = 0 and m.phone = number) x;
  -- Open batches first, as their intent does. Until two looks see the same: one may be cut before it is locked.
  loop
    batches := array(
      select distinct b.id from unnest(ids) as u(id)
        cross join lateral (select * from batch where first_id <= u.id order by first_id desc limit 1) b
       where b.last_id >= u.id and b.state < 10 order by b.id);
    exit when batches = seen;
    perform from batch where id = any (batches) order by id for no key update;
    seen := batches;
  end loop;
  if exists (select from batch b join unnest(campaigns, ids) as u(campaign_id, id) on u.id between b.first_id and b.last_id
               join message m on m.campaign_id = u.campaign_id and m.id = u.id and m.state is null
              where b.id = any (batches) and b.state = 3) then
    outcome := 'in_flight'; return;
  end if;
  perform from message m join unnest(campaigns, ids) as u(campaign_id, id) on m.campaign_id = u.campaign_id and m.id = u.id
    order by m.id for no key update of m;
  alias_ := -1 - ('x' || left(replace(gen_random_uuid()::text, '-', ''), 12))::bit(48)::bigint;
  insert into opt_out (tenant_id, phone, source) values (p_tenant, alias_, 'erased');
  for r in
    select m.campaign_id, m.id, m.segments, b.id as batch_id, b.n
      from unnest(campaigns, ids) as u(campaign_id, id)
      join message m on m.campaign_id = u.campaign_id and m.id = u.id and m.state is null
      join batch b on b.id = any (batches) and u.id between b.first_id and b.last_id
     where m.campaign_id <> 0 order by m.campaign_id
  loop
    update message set state = 50, reason = 'erased', finished_at = clock_timestamp()
     where campaign_id = r.campaign_id and id = r.id and state is null;
    update batch set n = n - 1, segments = segments - r.segments, state = case when n = 1 then 10 else state end,
                     owner = case when n > 1 then owner end, done_at = case when n = 1 then clock_timestamp() end
     where id = r.batch_id and state in (0, 1, 2);
    waiting_in := waiting_in || r.campaign_id; waiting_batch := waiting_batch || r.batch_id;
    waiting_worth := waiting_worth || r.segments::bigint;
  end loop;
  perform count_messages(u.id, 0, 0, 0, 0, 0, 1, 0) from (select unnest(waiting_in) as id order by 1) u;
  perform move_credits(p_tenant, 'release', u.worth, u.campaign_id, u.batch_id, 'erased')
     from unnest(waiting_in, waiting_batch, waiting_worth) as u(campaign_id, batch_id, worth);
  -- Nobody drops a single message at its intent: it is cancelled, or nothing opens it again.
  for r in
    select b.id, b.state from unnest(campaigns, ids) as u(campaign_id, id) join batch b on b.first_id = u.id
     where u.campaign_id = 0 order by b.id
  loop
    perform cancel_batch(r.id, '{0,1,2}');
    perform expose_unknown(r.id);
    update attempt set outcome = 'expired' where batch_id = r.id and attempt.outcome = 'unknown';
    update batch set reference = null, on_unknown = 'hold' where id = r.id;
  end loop;
  update message m set phone = alias_, text = null, detail = null
    from unnest(campaigns, ids) as u(campaign_id, id) where m.campaign_id = u.campaign_id and m.id = u.id;
  messages := cardinality(ids);
  delete from recipient where campaign_id in (select id from campaign where tenant_id = p_tenant) and phone = number;
  delete from contact_list_member where contact_id = p_contact;
  delete from contact where tenant_id = p_tenant and id = p_contact;
  -- What came in and could not be read may name the number. (Answers kept for a repeated request only open with the
  -- caller's key, and go in two days.)
  delete from raw_receipt
   where coalesce(account_id = (select account_id from tenant where id = p_tenant), true)
     and strpos(body, number::text) > 0;
  outcome := 'erased';
end $$;
