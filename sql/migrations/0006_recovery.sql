-- oldest code: 3
-- A failover and a restore can forget commits. Nobody claims, writes an intent or expands on another database than the
-- one that was kept, until those who were at work on it have said again what they had posted, or a person decides.

-- One row, written by the first registration. identity: the database whose history is known. While we are on another,
-- or this one has forgotten a heartbeat (doubted): where and since when, who has to say what it had posted, who did.
create table instance (
  one       boolean primary key default true check (one),
  identity  text not null,
  doubted   boolean not null default false,
  actual    text,
  found_at  timestamptz,
  awaited   bigint[] not null default '{}',
  asserted  bigint[] not null default '{}'
);

-- System, timeline, database. A promoted standby and a restored backup have another timeline, a restored dump is in
-- another system or database. Stable, so that a query that it guards runs only if it holds.
create function instance_now() returns text language plpgsql stable as $$
declare system_ text := '-'; timeline text := '-';
begin
  begin
    select system_identifier into system_ from pg_control_system();
    timeline := left(pg_walfile_name(pg_current_wal_lsn()), 8);
  exception when others then null;                      -- some hosts' Postgres have neither
  end;
  return format('system %s timeline %s database %s', system_, timeline,
                (select oid from pg_database where datname = current_database()));
end $$;

create function instance_is_kept() returns boolean language sql stable as
$$ select coalesce((select identity = instance_now() and not doubted from instance), true) $$;

-- Whether all who were at work before have spoken here.
create function instance_is_complete(i instance) returns boolean language sql volatile as $$
  select i.asserted <> '{}' and i.awaited <@ i.asserted
         and abs(extract(epoch from clock_timestamp() - i.found_at)) >= 3
$$;

-- Whether work may go on here. Who comes first to another database than the one kept writes down whom to wait for, and
-- leaves a gap in what is numbered: ids that were handed out and forgotten must not name anything else. Who comes after
-- the last awaited has spoken opens it; three seconds at least, for those whose registration was forgotten too.
create function look_at_instance() returns boolean language plpgsql as $$
declare i instance; now_ text;
begin
  if instance_is_kept() then return true; end if;
  now_ := instance_now();
  select * into i from instance;
  if i.actual = now_ and not instance_is_complete(i) then return false; end if;
  select * into i from instance for no key update;       -- it may be another's turn by now: looked at once more
  if i.identity = now_ and not i.doubted then return true; end if;
  if i.actual = now_ then
    if instance_is_complete(i) then perform keep_instance(); end if;
    return instance_is_complete(i);
  end if;
  update instance
     set actual = now_, found_at = clock_timestamp(), asserted = '{}',
         awaited = array(select id from replica where gone_at is null union select unnest(i.awaited) order by 1);
  perform pg_advisory_xact_lock(7276301);               -- see take_message_ids
  perform setval('message_id', nextval('message_id') + 100000000);
  perform setval(s.name, nextval(s.name) + 1000000)
     from (select pg_get_serial_sequence(t, 'id')::regclass as name
             from unnest('{batch,campaign,lane,replica}'::text[]) as t) s;
  return false;
end $$;

-- The history of this database is the one that counts from now on.
create function keep_instance() returns void language sql as $$
  update instance set identity = instance_now(), doubted = false, actual = null, found_at = null,
                      awaited = '{}', asserted = '{}'
$$;

-- Still here. p_known: the heartbeat that was acknowledged last. One that is lower now was forgotten, and what was
-- committed with it, even though nobody told (a copy of the files of an earlier day). No `beat`: declared dead.
create function beat(p_replica bigint, p_known bigint,
                     out beat bigint, out kept boolean, out identity text, out found_at timestamptz)
language plpgsql as $$
#variable_conflict use_column
begin
  update replica r set beat = r.beat + 1, beat_at = clock_timestamp()
   where r.id = p_replica and r.gone_at is null returning r.beat into beat;
  if beat <= p_known then update instance set doubted = true, actual = null where not doubted; end if;
  kept := look_at_instance();
  select i.identity, i.found_at into identity, found_at from instance i;
end $$;

-- ------------------------------------------------------------------------------------------- intent

create or replace function intent(p_batch bigint, p_owner bigint, p_epoch int)
returns table (verdict text, attempt int, sender text, ids bigint[], phones bigint[], texts text[])
language plpgsql set plan_cache_mode = force_generic_plan as $$
#variable_conflict use_column
declare b batch; l lane; dropped int := 0; worth bigint := 0; halted boolean;
begin
  select * into b from batch
   where id = p_batch and state = 2 and owner = p_owner and epoch = p_epoch for no key update;
  if not found then verdict := 'lost'; return next; return; end if;
  select * into l from lane where id = b.lane_id;
  if l.closed then
    perform cancel_batch(b.id, '{2}');
    perform give_back(b.account_id, b.tenant_id, b.slot, coalesce(b.cost, b.n));
    verdict := 'cancelled'; return next; return;
  end if;
  select l.paused or x.paused_reason is not null or coalesce(x.blocked_until > clock_timestamp(), false)
         or not instance_is_kept() into halted
    from traffic_account x where x.id = b.account_id;
  if halted then
    perform withdraw(b.id, b.epoch, 'paused');
    verdict := 'paused'; return next; return;
  end if;
  if b.campaign_id <> 0 then
    with gone as (
      update message m set state = 50, reason = 'opted_out', finished_at = clock_timestamp()
       where m.campaign_id = b.campaign_id and m.id between b.first_id and b.last_id and m.state is null
         and exists (select from opt_out o where o.tenant_id = b.tenant_id and o.phone = m.phone)
      returning m.segments)
    select count(*), coalesce(sum(gone.segments), 0) into dropped, worth from gone;
  end if;
  if dropped > 0 then
    perform count_messages(b.campaign_id, 0, 0, 0, 0, 0, dropped, 0);
    perform move_credits(b.tenant_id, 'release', worth, b.campaign_id, b.id, 'opted_out');
  end if;
  if dropped = b.n then
    update batch set state = 10, n = 0, segments = 0, owner = null, done_at = clock_timestamp() where id = b.id;
    perform give_back(b.account_id, b.tenant_id, b.slot, coalesce(b.cost, b.n));
    verdict := 'empty'; return next; return;
  end if;
  update batch set state = 3, attempt = batch.attempt + 1, n = batch.n - dropped, segments = batch.segments - worth
   where id = b.id;
  insert into attempt (batch_id, n, campaign_id, first_id, last_id, replica_id, slot_at, pair)
  values (b.id, b.attempt + 1, b.campaign_id, b.first_id, b.last_id, p_owner, from_us(b.slot), b.pair);
  return query
    select 'post', b.attempt + 1, b.sender, array_agg(m.id), array_agg(m.phone), array_agg(m.text)
      from (select id, phone, text from message m
             where m.campaign_id = b.campaign_id and m.id between b.first_id and b.last_id and m.state is null
             order by id) m;
end $$;

-- ------------------------------------------------------------------------------------------- re-assertion

-- What stands open in a range of a campaign's messages, as a batch counts it.
create function open_messages(p_campaign bigint, p_first bigint, p_last bigint, out n int, out segments int)
language sql stable as $$
  select count(*)::int, coalesce(sum(m.segments), 0)::int from message m
   where m.campaign_id = p_campaign and m.id between p_first and p_last and m.state is null
$$;

-- A batch of its own for a part of another. What a batch was posting is unknown once it is no part of that batch; what
-- was only leased is ready.
create function part_batch(b batch, p_first bigint, p_last bigint) returns void language sql as $$
  insert into batch (campaign_id, lane_id, tenant_id, account_id, first_id, last_id, n, segments, state, tries,
                     not_before, sender, created_at, done_at, unsure)
  select b.campaign_id, b.lane_id, b.tenant_id, b.account_id, p_first, p_last, o.n, o.segments,
         case b.state when 2 then 0 when 3 then 11 else b.state end, b.tries, b.not_before, b.sender, b.created_at,
         b.done_at, b.unsure
    from open_messages(b.campaign_id, p_first, p_last) o
$$;

-- Clears p_first..p_last of every batch other than p_batch, and p_batch of everything else: what is outside stays with
-- its batch or becomes one. False: somebody else's attempt stands inside. Returns in p_held what is held for that range.
create function clear_range(p_batch bigint, p_campaign bigint, p_first bigint, p_last bigint,
                            out cleared boolean, out held bigint) language plpgsql as $$
declare o batch; part record;
begin
  cleared := true; held := 0;
  for o in
    select * from batch
     where campaign_id = p_campaign and first_id <= p_last and last_id >= p_first
       and first_id >= coalesce((select max(first_id) from batch
                                  where campaign_id = p_campaign and first_id <= p_first), p_first)
     order by id = p_batch, id for no key update
  loop
    if o.state not in (10, 12) then
      select * into part from open_messages(p_campaign, greatest(o.first_id, p_first), least(o.last_id, p_last));
      held := held + part.segments;
    end if;
    if o.id = p_batch then
      update batch set first_id = p_first, last_id = p_last where id = o.id;
      if o.first_id < p_first then perform part_batch(o, o.first_id, p_first - 1); end if;
    elsif o.first_id < p_first then
      update batch b set last_id = p_first - 1, (n, segments) = (select * from open_messages(p_campaign, o.first_id, p_first - 1))
       where b.id = o.id;
    elsif o.last_id > p_last then
      update batch b set first_id = p_last + 1, (n, segments) = (select * from open_messages(p_campaign, p_last + 1, o.last_id))
       where b.id = o.id;
      continue;
    elsif o.attempt > 0 then
      cleared := false; return;
    else
      delete from batch where id = o.id;
    end if;
    if o.last_id > p_last then perform part_batch(o, p_last + 1, o.last_id); end if;
  end loop;
end $$;

-- A replica says that it had posted these messages as this attempt. What the database forgot of it is brought back: the
-- messages, their batch and its range, the attempt, the hold. It is being posted then, until its result is written like
-- any other. Returns
--   known      nothing was forgotten, or a newer attempt is there
--   restored
--   lost       the campaign itself, or its lane, is not there any more
--   conflict   something else stands in its place; nothing was changed
create function reassert(p_batch bigint, p_epoch int, p_attempt int, p_campaign bigint, p_tenant bigint,
                         p_account bigint, p_replica bigint, p_slot bigint, p_sender text, p_ids bigint[],
                         p_phones bigint[], p_texts text[], p_segments int[])
returns text language plpgsql as $$
declare
  b batch; lane_ bigint; first_ bigint := p_ids[1]; last_ bigint := p_ids[cardinality(p_ids)]; cleared boolean;
  held bigint; added bigint; need bigint; part bigint; reopened bigint; unsure_ bigint; gone bigint; forgone bigint;
begin
  if p_campaign <> 0 then
    perform from campaign where id = p_campaign for no key update;
    perform from expansion where campaign_id = p_campaign for no key update;
  end if;
  select id into lane_ from lane
   where account_id = p_account and tenant_id = p_tenant and campaign_id = p_campaign
     and class = case when p_campaign = 0 then 0 else 1 end;
  if not found then return 'lost'; end if;
  select * into b from batch where id = p_batch for no key update;
  if b.attempt >= p_attempt then return 'known'; end if;
  if b.campaign_id <> p_campaign or first_ > b.last_id or last_ < b.first_id
     or exists (select from unnest(p_ids, p_phones) as u(id, phone) join message m
                    on m.campaign_id = p_campaign and m.phone = u.phone and m.id <> u.id where p_campaign <> 0)
     or exists (select from message m
                 where m.campaign_id = p_campaign and m.id = any (p_ids) and m.state not in (5, 40)) then
    return 'conflict';
  end if;
  begin
    select x.cleared, x.held into cleared, held from clear_range(p_batch, p_campaign, first_, last_) x;
    if not cleared then raise exception using errcode = 'RE001'; end if;
    with added_ as (
      insert into message (campaign_id, id, phone, text, segments)
      select p_campaign, u.id, u.phone, u.text, u.segments
        from unnest(p_ids, p_phones, p_texts, p_segments) as u(id, phone, text, segments)
      on conflict do nothing returning segments)
    select coalesce(sum(segments), 0) into added from added_;
    with was as (
      select id, state, segments from message
       where campaign_id = p_campaign and id = any (p_ids) and state in (5, 40) for no key update),
    open_ as (
      update message m set state = null, reason = null, detail = null, settled_at = null, finished_at = null
        from was where m.campaign_id = p_campaign and m.id = was.id)
    select count(*) filter (where state = 40), count(*) filter (where state = 5),
           held + coalesce(sum(segments) filter (where state = 5), 0)
      into reopened, unsure_, held from was;
    perform count_messages(p_campaign, 0, 0, 0, -reopened, -unsure_, 0, 0);
    -- Between those that were posted: dropped by the intent that was forgotten, as long as nobody else can have had them.
    with between_ as (
      update message m
         set state = case when x.dropped then 50 else 5 end,
             reason = case when x.dropped then 'opted_out' else 'no_answer' end,
             settled_at = case when not x.dropped then clock_timestamp() end,
             finished_at = case when x.dropped then clock_timestamp() end
        from (select y.id, p_attempt = 1 or exists (select from opt_out o where o.tenant_id = p_tenant and o.phone = y.phone)
                     as dropped
                from message y
               where y.campaign_id = p_campaign and y.id between first_ and last_ and y.state is null
                 and y.id <> all (p_ids)) x
       where m.campaign_id = p_campaign and m.id = x.id returning m.state, m.segments)
    select count(*) filter (where state = 50), count(*) filter (where state = 5),
           coalesce(sum(segments) filter (where state = 5), 0) into gone, unsure_, forgone from between_;
    perform count_messages(p_campaign, 0, 0, 0, 0, unsure_, gone, 0);
    need := forgone + (select segments from open_messages(p_campaign, first_, last_)) - held;
    -- The audience that will be read again was held for them.
    update expansion e set held = e.held - least(e.held, added, greatest(need, 0)) from expansion old
     where e.campaign_id = p_campaign and p_campaign <> 0 and old.campaign_id = e.campaign_id
    returning old.held - e.held into part;
    need := need - coalesce(part, 0);
    if need < 0 then
      perform move_credits(p_tenant, 'release', -need, p_campaign, p_batch, 'reasserted');
    elsif not move_credits(p_tenant, 'hold', need, p_campaign, p_batch, 'reasserted') then
      raise exception using errcode = 'RE002';
    end if;
    if b.id is null then
      insert into batch (id, campaign_id, lane_id, tenant_id, account_id, first_id, last_id, n, segments, sender)
      overriding system value
      values (p_batch, p_campaign, lane_, p_tenant, p_account, first_, last_, 0, 0, p_sender);
    end if;
    update batch
       set state = 3, epoch = p_epoch, attempt = p_attempt, owner = p_replica, slot = p_slot, not_before = null,
           done_at = null, unsure = batch.unsure + unsure_,
           (n, segments) = (select * from open_messages(p_campaign, first_, last_))
     where id = p_batch;
    insert into attempt (batch_id, n, campaign_id, first_id, last_id, replica_id, slot_at, intent_at)
    values (p_batch, p_attempt, p_campaign, first_, last_, p_replica, from_us(p_slot), from_us(p_slot))
    on conflict do nothing;
    perform setval('message_id', last_) from message_id where last_value < last_;
    perform setval('batch_id_seq', p_batch) from batch_id_seq where last_value < p_batch;
    perform reopen_campaign(p_campaign);
  exception
    when sqlstate 'RE001' then return 'conflict';
    when sqlstate 'RE002' then return 'unpaid';
  end;
  return 'restored';
end $$;

-- A replica has said all that it had posted. p_ids: what it was registered as; p_kept: the database on which it worked
-- before; p_complete: it still knew all that may have been forgotten. What stands as being posted by it, and it knows
-- nothing of (p_batches is all that it knows), was given back or answered in what was forgotten: that is unknown.
create function assert_instance(p_ids bigint[], p_kept text, p_complete boolean, p_batches bigint[])
returns boolean language plpgsql as $$
begin
  if instance_is_kept() then return true; end if;
  with stray as (
    update batch set state = 11, owner = null
     where state = 3 and owner = any (p_ids) and id <> all (p_batches) returning id, attempt)
  update attempt a set outcome = 'unknown', detail = 'replica_died', ended_at = clock_timestamp()
    from stray where a.batch_id = stray.id and a.n = stray.attempt and a.outcome is null;
  if p_complete then
    update instance set asserted = asserted || p_ids where identity = p_kept and actual = instance_now();
  end if;
  return look_at_instance();
end $$;

-- A person decides: what is here counts. p_unknown: what is queued may have been sent after this copy was made. It is
-- unknown then, since its batch was made; and a campaign whose audience was still being read waits for its user.
-- Returns how many messages became unknown, and how many campaigns wait.
create function accept_instance(p_unknown boolean, out unknown bigint, out paused bigint) language plpgsql as $$
declare c record;
begin
  unknown := 0; paused := 0;
  perform look_at_instance();
  if p_unknown then
    for c in select campaign_id from expansion where state = 'running' order by campaign_id loop
      paused := paused + pause_campaign(c.campaign_id, 'RESTORED', 'it may have been sent further than this')::int;
    end loop;
    with stopped as (
      update batch set state = 11, owner = null, slot = null, not_before = null, attempt = attempt + 1
       where state in (0, 1, 2) returning *),
    noted as (
      insert into attempt (batch_id, n, campaign_id, first_id, last_id, replica_id, slot_at, intent_at, ended_at,
                           outcome, detail)
      select id, attempt, campaign_id, first_id, last_id, 0, created_at, created_at, clock_timestamp(), 'unknown',
             'restored' from stopped)
    select coalesce(sum(n), 0) into unknown from stopped;
  end if;
  perform keep_instance();
end $$;
