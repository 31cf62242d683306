-- oldest code: 1
-- How large an audience is and who is in it, without reading a million rows to answer an enqueue.

-- Kept sizes, summed over shards so that writers seldom meet. Kind 0: contacts of a tenant, 1: members of a list,
-- 2: readable recipients uploaded for a campaign.
create table audience_size (
  kind   smallint not null check (kind in (0, 1, 2)),
  id     bigint not null,
  shard  smallint not null,
  n      bigint not null,
  primary key (kind, id, shard)
) with (fillfactor = 50);

-- Statement trigger; arguments: kind, column of the id, column whose values are counted.
create function count_audience() returns trigger language plpgsql as $$
begin
  execute format(
    'insert into audience_size as a (kind, id, shard, n)
     select %1$s, %2$I, pg_backend_pid() %% 8, %4$s * count(%3$I) from changed group by %2$I having count(%3$I) > 0
      order by %2$I
     on conflict (kind, id, shard) do update set n = a.n + excluded.n',
    tg_argv[0], tg_argv[1], tg_argv[2], case tg_op when 'INSERT' then 1 else -1 end);
  return null;
end $$;

create trigger contact_added after insert on contact referencing new table as changed
  for each statement execute function count_audience('0', 'tenant_id', 'id');
create trigger contact_removed after delete on contact referencing old table as changed
  for each statement execute function count_audience('0', 'tenant_id', 'id');
create trigger member_added after insert on contact_list_member referencing new table as changed
  for each statement execute function count_audience('1', 'list_id', 'contact_id');
create trigger member_removed after delete on contact_list_member referencing old table as changed
  for each statement execute function count_audience('1', 'list_id', 'contact_id');
create trigger recipient_added after insert on recipient referencing new table as changed
  for each statement execute function count_audience('2', 'campaign_id', 'phone');
create trigger recipient_removed after delete on recipient referencing old table as changed
  for each statement execute function count_audience('2', 'campaign_id', 'phone');

create function audience_size(p_kind int, p_id bigint) returns bigint language sql stable as
$$ select coalesce(sum(n), 0)::bigint from audience_size where kind = p_kind and id = p_id $$;

-- Lists that are not the tenant's have no members for it.
create function own_lists(p_tenant bigint, p_lists bigint[]) returns bigint[] language sql stable as
$$ select coalesce(array_agg(id), '{}') from contact_list where tenant_id = p_tenant and id = any (p_lists) $$;

-- Null bounds take everybody; whoever told no gender or birthday passes no filter on it.
create function person_matches(gender text, birthday date, p_gender text, p_born_until date, p_born_after date)
returns boolean language sql immutable as $$
  select (p_gender is null or gender = p_gender) and (p_born_until is null or birthday <= p_born_until)
     and (p_born_after is null or birthday > p_born_after)
$$;

-- The latest birthday of a person of that age on a day.
create function born_until(p_as_of date, p_age int) returns date language sql immutable as
$$ select (p_as_of - make_interval(years => p_age))::date $$;

-- Subscribed contacts of the audience, counted one by one; for all contacts, those that are left out are counted.
-- Hash joins, whatever the caller pinned and the planner knows: it reads all, and nested loops would compare each
-- contact with each member.
create function audience_count(p_tenant bigint, p_lists bigint[], p_exclude bigint[], p_gender text,
                               p_youngest int, p_oldest int, p_as_of date)
returns bigint language plpgsql stable set plan_cache_mode = force_custom_plan
set enable_nestloop = off set enable_hashjoin = on set enable_seqscan = on set enable_bitmapscan = on
set enable_sort = on as $$
declare
  lists bigint[] := own_lists(p_tenant, p_lists);
  exclude bigint[] := own_lists(p_tenant, p_exclude);
  until date := born_until(p_as_of, p_youngest);
  after date := born_until(p_as_of, p_oldest + 1);
begin
  if cardinality(p_lists) = 0 and p_gender is null and until is null and after is null then
    return audience_size(0, p_tenant) - (
      select count(*) from (
        select o.phone from opt_out o join contact c on c.tenant_id = o.tenant_id and c.phone = o.phone
         where o.tenant_id = p_tenant
        union
        select c.phone from contact_list_member m join contact c on c.id = m.contact_id
         where m.list_id = any (exclude)) left_out);
  elsif cardinality(p_lists) = 0 then
    return (
      select count(*) from contact c
       where c.tenant_id = p_tenant and person_matches(c.gender, c.birthday, p_gender, until, after)
         and not exists (select from opt_out o where o.tenant_id = c.tenant_id and o.phone = c.phone)
         and not exists (select from contact_list_member x
                          where x.list_id = any (exclude) and x.contact_id = c.id));
  end if;
  return (
    select count(*)
      from (select distinct m.contact_id from contact_list_member m where m.list_id = any (lists)) m
      join contact c on c.id = m.contact_id
     where c.tenant_id = p_tenant and person_matches(c.gender, c.birthday, p_gender, until, after)
       and not exists (select from opt_out o where o.tenant_id = c.tenant_id and o.phone = c.phone)
       and not exists (select from contact_list_member x
                        where x.list_id = any (exclude) and x.contact_id = c.id));
end $$;

-- In what follows only what is near is looked up, whatever the planner knows of the tables: nested loops are pinned,
-- `offset 0` keeps a look-up a look-up, and comparing (tenant_id, id) as a row keeps the scan in contact_by_tenant (by
-- contact_pkey it would step over all other tenants).

-- The newest contact of a tenant; null: there is none.
create function highest_contact(p_tenant bigint) returns bigint language sql stable
set enable_seqscan = off set enable_bitmapscan = off set enable_sort = off set enable_incremental_sort = off as $$
  select id from contact where (tenant_id, id) > (p_tenant, 0) and (tenant_id, id) < (p_tenant + 1, 0)
   order by tenant_id desc, id desc limit 1
$$;

-- The same count in the time that an enqueue has. Exact where the lists are no larger than a sample, and where the
-- tenant has at most p_exact_up_to contacts; else from a sample of some 10,000 and the kept sizes: 50 neighbours at
-- each of 200 places spread evenly over the ids, per list. A contact of several lists counts with the first of them
-- only (Karp and Luby's estimator of a union).
create function audience_estimate(p_tenant bigint, p_lists bigint[], p_exclude bigint[], p_gender text,
                                  p_youngest int, p_oldest int, p_as_of date, p_exact_up_to bigint)
returns bigint language plpgsql stable set plan_cache_mode = force_custom_plan
set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off
set enable_material = off set enable_sort = off set enable_incremental_sort = off as $$
declare
  lists bigint[] := own_lists(p_tenant, p_lists);
  exclude bigint[] := own_lists(p_tenant, p_exclude);
  until date := born_until(p_as_of, p_youngest);
  after date := born_until(p_as_of, p_oldest + 1);
  everybody boolean := cardinality(p_lists) = 0;
  most bigint;
  low bigint;
  high bigint;
  places int;
begin
  select case when everybody then audience_size(0, p_tenant) else coalesce(sum(audience_size(1, l)), 0) end
    into most from unnest(lists) l;
  if most <= 10000 then
    return (select count(*) from audience_page(p_tenant, p_lists, p_exclude, p_gender, p_youngest, p_oldest, p_as_of,
                                               0, 9223372036854775807, 10000) where not opted_out);
  elsif audience_size(0, p_tenant) <= p_exact_up_to then
    return audience_count(p_tenant, p_lists, p_exclude, p_gender, p_youngest, p_oldest, p_as_of);
  end if;
  if everybody then
    select c.id into low from contact c where (c.tenant_id, c.id) >= (p_tenant, 0) order by c.tenant_id, c.id limit 1;
    high := highest_contact(p_tenant);
    return (
      with sample as (
        select distinct near.*
          from generate_series(0, 199) g, lateral (
                 select c.id, c.phone, c.gender, c.birthday from contact c
                  where (c.tenant_id, c.id) >= (p_tenant, low + (high - low) * g / 200)
                    and (c.tenant_id, c.id) <= (p_tenant, high)
                  order by c.tenant_id, c.id limit 50) near)
      select round(most::numeric * count(*) filter (
               where person_matches(s.gender, s.birthday, p_gender, until, after)
                 and not exists (select from opt_out o where o.tenant_id = p_tenant and o.phone = s.phone offset 0)
                 and not exists (select from unnest(exclude) e join contact_list_member x on x.list_id = e
                                  where x.contact_id = s.id offset 0)) / count(*))
        from sample s);
  end if;
  places := greatest(200 / cardinality(lists), 20);
  return (
    with list as (
      select l.id, l.place, audience_size(1, l.id) as size,
             (select min(contact_id) from contact_list_member where list_id = l.id) as low,
             (select max(contact_id) from contact_list_member where list_id = l.id) as high
        from unnest(lists) with ordinality as l(id, place)),
    sample as (
      select distinct list.id as list_id, list.place, list.size, near.contact_id
        from list, generate_series(0, places - 1) g, lateral (
               select m.contact_id from contact_list_member m
                where m.list_id = list.id and m.contact_id >= list.low + (list.high - list.low) * g / places
                order by m.contact_id limit 50) near),
    part as (
      select s.size::numeric * count(*) filter (
               where person_matches(c.gender, c.birthday, p_gender, until, after)
                 and not exists (select from opt_out o where o.tenant_id = p_tenant and o.phone = c.phone offset 0)
                 and not exists (select from unnest(lists[:s.place - 1] || exclude) e
                                   join contact_list_member x on x.list_id = e
                                  where x.contact_id = s.contact_id offset 0)) / count(*) as n
        from sample s, lateral (select * from contact where id = s.contact_id offset 0) c
       group by s.list_id, s.place, s.size)
    select round(coalesce(sum(n), 0)) from part);
end $$;

-- The next contacts of the audience by id, at most p_limit of them, the opted-out marked and not left out: fewer
-- than p_limit are the last.
create function audience_page(p_tenant bigint, p_lists bigint[], p_exclude bigint[], p_gender text, p_youngest int,
                              p_oldest int, p_as_of date, p_after bigint, p_highest bigint, p_limit int)
returns table (id bigint, phone bigint, first_name text, last_name text, email text, gender text, birthday date,
               attributes jsonb, opted_out boolean)
language plpgsql stable set plan_cache_mode = force_custom_plan
set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off
set enable_material = off set enable_sort = off set enable_incremental_sort = off as $$
#variable_conflict use_column
declare
  lists bigint[] := own_lists(p_tenant, p_lists);
  exclude bigint[] := own_lists(p_tenant, p_exclude);
  until date := born_until(p_as_of, p_youngest);
  after date := born_until(p_as_of, p_oldest + 1);
begin
  if cardinality(p_lists) = 0 then
    return query
      select c.id, c.phone, c.first_name, c.last_name, c.email, c.gender, c.birthday, c.attributes,
             exists (select from opt_out o where o.tenant_id = p_tenant and o.phone = c.phone offset 0)
        from (select c.* from contact c
               where (c.tenant_id, c.id) > (p_tenant, p_after) and (c.tenant_id, c.id) <= (p_tenant, p_highest)
                 and person_matches(c.gender, c.birthday, p_gender, until, after)
                 and not exists (select from unnest(exclude) e join contact_list_member x on x.list_id = e
                                  where x.contact_id = c.id offset 0)
               order by c.tenant_id, c.id limit p_limit) c
       order by c.id;
    return;
  end if;
  return query
    select c.id, c.phone, c.first_name, c.last_name, c.email, c.gender, c.birthday, c.attributes,
           exists (select from opt_out o where o.tenant_id = p_tenant and o.phone = c.phone offset 0)
      from (select distinct near.contact_id
              from unnest(lists) l(id), lateral (
                     select m.contact_id
                       from contact_list_member m, lateral (select * from contact where contact.id = m.contact_id offset 0) c
                      where m.list_id = l.id and m.contact_id > p_after and m.contact_id <= p_highest
                        and c.tenant_id = p_tenant
                        and person_matches(c.gender, c.birthday, p_gender, until, after)
                        and not exists (select from unnest(exclude) e join contact_list_member x on x.list_id = e
                                         where x.contact_id = m.contact_id offset 0)
                      order by m.contact_id limit p_limit) near
             order by near.contact_id limit p_limit) near,
           lateral (select * from contact where contact.id = near.contact_id offset 0) c
     order by c.id;
end $$;

-- Contacts of a tenant, newest first: how many there are and the ids of one page. p_low and p_high: ranges of phone
-- numbers, disjoint; p_name: a pattern for first and last name. What is not searched is counted by its kept size.
create function find_contacts(p_tenant bigint, p_list bigint, p_subscribed boolean, p_low bigint[], p_high bigint[],
                              p_name text, p_limit int, p_offset bigint, out total bigint, out ids bigint[])
language plpgsql stable set plan_cache_mode = force_custom_plan set enable_incremental_sort = off as $$
begin
  if p_subscribed is null and p_low is null and p_name is null then
    if p_list is null then
      total := audience_size(0, p_tenant);
      ids := array(select c.id from contact c
                    where (c.tenant_id, c.id) > (p_tenant, 0) and (c.tenant_id, c.id) < (p_tenant + 1, 0)
                    order by c.tenant_id desc, c.id desc limit p_limit offset p_offset);
    else
      total := audience_size(1, p_list);
      ids := array(select m.contact_id from contact_list_member m
                    where m.list_id = p_list order by m.contact_id desc limit p_limit offset p_offset);
    end if;
    return;
  end if;
  with searched as (
    select c.id, c.phone from contact c
     where p_low is null and p_subscribed is distinct from false and c.tenant_id = p_tenant
       and (p_name is null or concat_ws(' ', c.first_name, c.last_name) ilike p_name)
    union all
    select c.id, c.phone
      from unnest(p_low, p_high) r(low, high) join contact c on c.tenant_id = p_tenant and c.phone between r.low and r.high
     where p_low is not null
    union all
    select c.id, c.phone from opt_out o join contact c on c.tenant_id = o.tenant_id and c.phone = o.phone
     where p_low is null and p_subscribed = false and o.tenant_id = p_tenant
       and (p_name is null or concat_ws(' ', c.first_name, c.last_name) ilike p_name)),
  found as (
    select s.id from searched s
     where (p_list is null or exists (select from contact_list_member m where m.list_id = p_list and m.contact_id = s.id))
       and (p_subscribed is null
            or p_subscribed <> exists (select from opt_out o where o.tenant_id = p_tenant and o.phone = s.phone)))
  select count(*), array(select f.id from found f order by f.id desc limit p_limit offset p_offset)
    into total, ids from found;
end $$;

-- One block of an import, its numbers all different: adds contacts, or changes what the block has a value for, merges
-- attributes, opts out, and puts all of them on the list. Returns how many were new; null: the list is gone.
create function import_contacts(p_tenant bigint, p_list bigint, p_phones bigint[], p_first_names text[],
                                p_last_names text[], p_emails text[], p_genders text[], p_birthdays date[],
                                p_attributes text[], p_opted_out bigint[])
returns bigint language plpgsql
set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off
set enable_material = off set enable_sort = off set enable_incremental_sort = off as $$
declare created bigint;
begin
  if p_list is not null then
    perform from contact_list where id = p_list and tenant_id = p_tenant for key share;
    if not found then return null; end if;
  end if;
  insert into opt_out (tenant_id, phone, source)
  select p_tenant, phone, 'import' from unnest(p_opted_out) phone order by phone on conflict do nothing;
  with written as (
    insert into contact as c (tenant_id, phone, first_name, last_name, email, gender, birthday, attributes)
    select p_tenant, u.phone, u.first_name, u.last_name, u.email, u.gender, u.birthday, u.attributes::jsonb
      from unnest(p_phones, p_first_names, p_last_names, p_emails, p_genders, p_birthdays, p_attributes)
           as u(phone, first_name, last_name, email, gender, birthday, attributes)
     order by u.phone
    on conflict (tenant_id, phone) do update
       set first_name = coalesce(excluded.first_name, c.first_name),
           last_name = coalesce(excluded.last_name, c.last_name), email = coalesce(excluded.email, c.email),
           gender = coalesce(excluded.gender, c.gender), birthday = coalesce(excluded.birthday, c.birthday),
           attributes = c.attributes || excluded.attributes, updated_at = clock_timestamp()
     where (coalesce(excluded.first_name, c.first_name), coalesce(excluded.last_name, c.last_name),
            coalesce(excluded.email, c.email), coalesce(excluded.gender, c.gender),
            coalesce(excluded.birthday, c.birthday), c.attributes || excluded.attributes)
           is distinct from (c.first_name, c.last_name, c.email, c.gender, c.birthday, c.attributes)
    returning xmax = 0 as created)
  select count(*) filter (where written.created) into created from written;
  if p_list is not null then
    insert into contact_list_member (list_id, contact_id)
    select p_list, c.id
      from unnest(p_phones) given(phone), lateral (
             select id from contact
              where (tenant_id, phone) >= (p_tenant, given.phone) and (tenant_id, phone) <= (p_tenant, given.phone)
              order by tenant_id, phone limit 1) c
     order by c.id on conflict do nothing;
  end if;
  return created;
end $$;
