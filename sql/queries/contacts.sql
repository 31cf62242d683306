-- name: show_contacts
-- Contacts of a tenant in the order of the ids, each with its lists and whether its number may be texted.
select c.id, c.phone, c.first_name, c.last_name, c.email, c.gender, c.birthday, c.attributes,
       array(select m.list_id from contact_list_member m where m.contact_id = c.id order by m.list_id) as list_ids,
       o.phone is null as is_subscribed, c.created_at, c.updated_at
  from unnest($2::bigint[]) with ordinality as wanted(id, place)
  join contact c on c.id = wanted.id and c.tenant_id = $1
  left join opt_out o on o.tenant_id = c.tenant_id and o.phone = c.phone
 order by wanted.place;

-- name: find_contacts
-- How many contacts the filters take, and the ids of one page of them, newest first.
select total, ids from find_contacts($1, $2, $3, $4, $5, $6, $7, $8);

-- name: insert_contact
-- A new contact; no row: the tenant has one with this number.
insert into contact (tenant_id, phone, first_name, last_name, email, gender, birthday, attributes)
values ($1, $2, $3, $4, $5, $6, $7, $8) on conflict (tenant_id, phone) do nothing returning id;

-- name: contact_of_phone
-- The contact with this number.
select id from contact where tenant_id = $1 and phone = $2;

-- name: lock_contact
-- Keeps others from changing the contact until we are done.
select id from contact where tenant_id = $1 and id = $2 for no key update;

-- name: update_contact
-- All of a contact anew.
update contact set phone = $3, first_name = $4, last_name = $5, email = $6, gender = $7, birthday = $8,
                   attributes = $9, updated_at = clock_timestamp()
 where tenant_id = $1 and id = $2;

-- name: delete_contact
-- The contact goes; whether its number may be texted stays known.
delete from contact where tenant_id = $1 and id = $2 returning id;

-- name: erase_contact
-- Forgets the person: erased | absent | importing | in_flight, and of how many messages.
select outcome, messages from erase_contact($1, $2);

-- name: leave_lists
-- A contact is on none of its lists but these.
delete from contact_list_member where contact_id = $1 and list_id <> all ($2::bigint[]);

-- name: join_lists
-- A contact is on these lists too.
insert into contact_list_member (list_id, contact_id)
select list_id, $1 from unnest($2::bigint[]) list_id order by list_id on conflict do nothing;

-- name: keep_lists
-- Those of the lists that the tenant has; they cannot be deleted before we are done.
select id from contact_list where tenant_id = $1 and id = any ($2::bigint[]) order by id for key share;

-- name: insert_list
-- A new list; no row: the tenant has one of this name.
insert into contact_list (tenant_id, name) values ($1, $2) on conflict (tenant_id, name) do nothing returning id;

-- name: rename_list
-- The list's new name.
update contact_list set name = $3 where tenant_id = $1 and id = $2 returning id;

-- name: show_lists
-- Lists of a tenant by name, each with how many contacts are on it.
select id, name, audience_size(1, id) as contacts, created_at
  from contact_list where tenant_id = $1 and ($2::bigint is null or id = $2)
 order by name, id limit $3 offset $4;

-- name: count_lists
-- How many lists the tenant has.
select count(*) from contact_list where tenant_id = $1;

-- name: campaigns_of_list
-- Campaigns that are yet to be expanded and name the list.
select id from campaign
 where tenant_id = $1 and ($2 = any (list_ids) or $2 = any (exclude_list_ids))
   and status in ('draft', 'scheduled', 'sending', 'paused')
 order by id limit 10;

-- name: delete_list
-- The list goes; who was on it stays a contact.
delete from contact_list where tenant_id = $1 and id = $2 returning id;

-- name: empty_list
-- Nobody is on it any more.
delete from contact_list_member where list_id = $1;

-- name: keep_contacts
-- Those of the contacts that the tenant has; they cannot be deleted before we are done.
select id from contact where tenant_id = $1 and id = any ($2::bigint[]) order by id for key share;

-- name: add_to_list
-- They are on the list; returns those who were not.
insert into contact_list_member (list_id, contact_id)
select $1, id from unnest($2::bigint[]) id order by id on conflict do nothing returning contact_id;

-- name: remove_from_list
-- The contact is not on the list; no row: it was not.
delete from contact_list_member where list_id = $1 and contact_id = $2 returning contact_id;

-- name: opt_out
-- The number is not texted any more. Keeps the first reason; no row: it was known.
insert into opt_out (tenant_id, phone, source, campaign_id) values ($1, $2, $3, $4)
on conflict (tenant_id, phone) do nothing returning phone;

-- name: opt_in
-- The number may be texted again; no row: it might already.
delete from opt_out where tenant_id = $1 and phone = $2 returning phone;

-- name: sender_to
-- What a recipient is told of who texts them, and whether they opted out of it.
select name, exists (select from opt_out where tenant_id = $1 and phone = $2) as opted_out from tenant where id = $1;

-- name: highest_id
-- The newest contact of the tenant; null: there is none.
select highest_contact($1);

-- name: audience_count
-- Subscribed contacts of the audience, counted.
select audience_count($1, $2, $3, $4, $5, $6, $7);

-- name: audience_estimate
-- The same; from a sample where it may be more than $8.
select audience_estimate($1, $2, $3, $4, $5, $6, $7, $8);

-- name: audience_page
-- The next contacts of the audience by id, the opted-out marked; attributes as they are written.
select id, phone, first_name, last_name, email, gender, birthday, attributes::text, opted_out
  from audience_page($1, $2, $3, $4, $5, $6, $7, $8, $9, $10);

-- name: recipient_count
-- Uploaded recipients that can be texted.
select audience_size(2, $1) - (
  select count(*) from campaign c join opt_out o on o.tenant_id = c.tenant_id
    join recipient r on r.campaign_id = c.id and r.phone = o.phone
   where c.id = $1);

-- name: recipient_page
-- The next uploaded recipients by id, the opted-out marked; phone is null where it could not be read.
select r.id, r.phone, r.raw, r.attributes::text, o.phone is not null as opted_out
  from (select * from recipient where campaign_id = $1 and id > $2 order by campaign_id, id limit $3) r
  left join opt_out o on o.tenant_id = (select tenant_id from campaign where id = $1) and o.phone = r.phone
 order by r.id;

-- name: add_recipients
-- Appends recipients in the order given; returns those whose number is new to the campaign, and the unreadable.
insert into recipient (campaign_id, phone, raw, attributes)
select $1, u.phone, u.raw, u.attributes::jsonb
  from unnest($2::bigint[], $3::text[], $4::text[]) with ordinality as u(phone, raw, attributes, place)
 order by u.place
on conflict (campaign_id, phone) do nothing returning phone;
