-- oldest code: 1
-- The tables. What each weighs, which index serves what and what is HOT stands in docs/data-model.md.

create table signing_key (
  id          bigint generated always as identity primary key,
  key         bytea not null,
  created_at  timestamptz not null default clock_timestamp(),
  retired_at  timestamptz
);

-- One row per registration; the id is the owner that leases name, so a process that starts again never owns old leases.
create table replica (
  id           bigint generated always as identity primary key,
  name         text not null,
  version      text not null,
  started_at   timestamptz not null default clock_timestamp(),
  beat         bigint not null default 0,
  beat_at      timestamptz not null default clock_timestamp(),
  gone_at      timestamptz,
  gone_reason  text
) with (fillfactor = 50);
create index replica_alive on replica (id) where gone_at is null;

create table traffic_account (
  id                   bigint generated always as identity primary key,
  name                 text not null,
  provider_id          text not null unique,
  api_key              text,
  requests_per_second  int not null default 100 check (requests_per_second > 0),
  messages_per_second  int check (messages_per_second > 0),
  max_in_flight        int check (max_in_flight > 0),
  webhook_secret       text unique,
  server_error_means   text not null default 'refused' check (server_error_means in ('refused', 'unknown')),
  largest_request      int not null default 500 check (largest_request > 0),
  blocked_until        timestamptz,
  paused_reason        text,
  paused_detail        text,
  created_at           timestamptz not null default clock_timestamp(),
  updated_at           timestamptz not null default clock_timestamp()
) with (fillfactor = 70);

create table tenant (
  id                   bigint generated always as identity primary key,
  name                 text not null,
  account_id           bigint not null references traffic_account,
  sender               text,
  requests_per_second  int not null default 50 check (requests_per_second > 0),
  messages_per_second  int check (messages_per_second > 0),
  weight               float8 not null default 1 check (weight > 0),
  batch_size           int check (batch_size between 1 and 500),
  subscription         text not null default 'active' check (subscription in ('active', 'inactive')),
  timezone             text not null default 'UTC',
  default_country      text not null default 'GR',
  created_at           timestamptz not null default clock_timestamp(),
  updated_at           timestamptz not null default clock_timestamp()
) with (fillfactor = 70);
create index tenant_by_account on tenant (account_id);

create table tenant_key (
  id          bigint generated always as identity primary key,
  tenant_id   bigint not null references tenant,
  hash        bytea not null unique,
  prefix      text not null,
  created_at  timestamptz not null default clock_timestamp(),
  revoked_at  timestamptz
);
create index tenant_key_by_tenant on tenant_key (tenant_id, id);

-- Money: the state that every check reads, and the ledger that explains it. One credit is one segment.
create table credit (
  tenant_id  bigint primary key references tenant,
  granted    bigint not null default 0 check (granted >= 0),
  spent      bigint not null default 0 check (spent >= 0),
  reserved   bigint not null default 0 check (reserved >= 0),
  overdue    bigint not null default 0 check (overdue >= 0),
  check (reserved <= granted - spent)
) with (fillfactor = 30);

create table ledger (
  id              bigint generated always as identity primary key,
  tenant_id       bigint not null,
  at              timestamptz not null default clock_timestamp(),
  kind            text not null check (kind in ('grant', 'hold', 'spend', 'release')),
  amount          bigint not null check (amount > 0),
  campaign_id     bigint,
  batch_id        bigint,
  reason          text,
  balance_after   bigint not null check (balance_after >= 0),
  reserved_after  bigint not null check (reserved_after between 0 and balance_after)
);
create index ledger_by_tenant on ledger (tenant_id, id);
create index ledger_by_campaign on ledger (campaign_id) where campaign_id is not null;

-- The one place that says who must not be texted; a contact's isSubscribed is read from here.
create table opt_out (
  tenant_id    bigint not null,
  phone        bigint not null,
  at           timestamptz not null default clock_timestamp(),
  source       text not null,
  campaign_id  bigint,
  primary key (tenant_id, phone)
);

create table contact (
  id          bigint generated always as identity primary key,
  tenant_id   bigint not null,
  phone       bigint not null,
  first_name  text,
  last_name   text,
  email       text,
  gender      text check (gender in ('male', 'female', 'other', 'prefer_not_to_say')),
  birthday    date,
  attributes  jsonb not null default '{}',
  created_at  timestamptz not null default clock_timestamp(),
  updated_at  timestamptz not null default clock_timestamp(),
  unique (tenant_id, phone)
);
create index contact_by_tenant on contact (tenant_id, id);

create table contact_list (
  id          bigint generated always as identity primary key,
  tenant_id   bigint not null,
  name        text not null,
  created_at  timestamptz not null default clock_timestamp(),
  unique (tenant_id, name)
);

create table contact_list_member (
  list_id     bigint not null,
  contact_id  bigint not null,
  primary key (list_id, contact_id)
);
create index contact_list_member_by_contact on contact_list_member (contact_id);

-- An upload waits in pieces until replicas have read it, a block at a time of the job least recently moved. The cursor
-- is a byte offset at the start of a record, line is that record's; header: charset, delimiter and names, once read.
create table import_job (
  id           bigint generated always as identity primary key,
  tenant_id    bigint not null,
  list_id      bigint,
  status       text not null default 'uploading'
               check (status in ('uploading', 'queued', 'running', 'completed', 'failed')),
  size         bigint not null default 0,
  cursor       bigint not null default 0,
  line         bigint not null default 1,
  header       jsonb not null default '{}',
  processed    bigint not null default 0,
  total        bigint not null default 0,
  created      bigint not null default 0,
  updated      bigint not null default 0,
  skipped      bigint not null default 0,
  errors       jsonb not null default '[]',
  owner        bigint,
  created_at   timestamptz not null default clock_timestamp(),
  moved_at     timestamptz not null default clock_timestamp(),
  finished_at  timestamptz
) with (fillfactor = 50);
create index import_job_open on import_job (id) where status in ('uploading', 'queued', 'running');

create table import_piece (
  job_id  bigint not null references import_job on delete cascade,
  start   bigint not null,
  data    bytea not null,
  primary key (job_id, start)
);
alter table import_piece alter data set storage external;

create table campaign (
  id                bigint generated always as identity primary key,
  tenant_id         bigint not null,
  name              text not null,
  text              text,
  sender            text,
  message_type      text not null default 'marketing' check (message_type in ('marketing', 'service')),
  link_url          text,
  list_ids          bigint[] not null default '{}',
  exclude_list_ids  bigint[] not null default '{}',
  filter_gender     text,
  filter_age_group  text,
  status            text not null default 'draft' check (status in
                    ('draft', 'scheduled', 'sending', 'paused', 'completed', 'failed', 'cancelled')),
  paused_reason     text,
  paused_detail     text,
  refresh_cursor    bigint not null default 0,
  created_at        timestamptz not null default clock_timestamp(),
  updated_at        timestamptz not null default clock_timestamp(),
  scheduled_at      timestamptz,
  started_at        timestamptz,
  finished_at       timestamptz
) with (fillfactor = 70);
create index campaign_by_tenant on campaign (tenant_id, id);
create index campaign_sending on campaign (id) where status = 'sending';

-- Recipients uploaded for one campaign, instead of stored contacts. A number that cannot be read keeps its spelling in raw.
create table recipient (
  campaign_id  bigint not null,
  id           bigint generated always as identity,
  phone        bigint,
  raw          text,
  attributes   jsonb not null default '{}',
  primary key (campaign_id, id)
);
create unique index recipient_phone on recipient (campaign_id, phone);

-- A campaign's audience on its way to messages: the snapshot taken at enqueue, and the cursor of the chunks.
create table expansion (
  campaign_id   bigint primary key,
  tenant_id     bigint not null,
  lane_id       bigint not null,
  source        text not null check (source in ('contacts', 'recipients')),
  sender        text not null,
  template      text not null,
  as_of         date not null,
  batch_size    int not null,
  highest_id    bigint not null,
  cursor        bigint not null default 0,
  read          bigint not null default 0,
  of            bigint not null,
  held          bigint not null,
  state         text not null default 'running' check (state in ('running', 'paused', 'done', 'stopped')),
  owner         bigint,
  served_at     timestamptz not null default '-infinity',
  updated_at    timestamptz not null default clock_timestamp()
) with (fillfactor = 50);
create index expansion_running on expansion (tenant_id) where state = 'running';

-- The unit of fairness: account x tenant x class x campaign. Class 0 is single messages, 1 is campaigns.
create table lane (
  id            bigint generated always as identity primary key,
  account_id    bigint not null,
  tenant_id     bigint not null,
  class         smallint not null check (class in (0, 1)),
  campaign_id   bigint not null default 0,
  v             float8 not null default 0,
  cursor        bigint not null default 0,
  not_before    bigint not null default 0,
  idle          boolean not null default true,
  paused        boolean not null default false,
  closed        boolean not null default false,
  wakes         bigint not null default 0,
  splits        int not null default 0,
  splits_since  timestamptz not null default '-infinity',
  unique (account_id, tenant_id, class, campaign_id)
) with (fillfactor = 40, autovacuum_vacuum_cost_delay = 0);
create index lane_awake on lane (account_id) where not idle and not paused and not closed;
create index lane_by_campaign on lane (campaign_id) where campaign_id <> 0;

-- What is claimed, leased, limited, posted and settled: the messages of campaign_id from first_id to last_id
-- that have no state of their own (n of them, worth `segments` held credits).
create table batch (
  id           bigint generated always as identity primary key,
  campaign_id  bigint not null,
  lane_id      bigint not null,
  tenant_id    bigint not null,
  account_id   bigint not null,
  first_id     bigint not null,
  last_id      bigint not null,
  n            int not null check (n >= 0),
  segments     int not null check (segments >= 0),
  state        smallint not null default 0,
  epoch        int not null default 0,
  attempt      int not null default 0,
  tries        smallint not null default 0,
  owner        bigint,
  slot         bigint,
  not_before   timestamptz,
  sender       text not null,
  bulk_id      text,
  reference    text,
  pair         bigint,
  created_at   timestamptz not null default clock_timestamp(),
  done_at      timestamptz,
  check (first_id <= last_id)
) with (fillfactor = 60);
create sequence batch_pair as bigint;
create index batch_open on batch (lane_id, state, first_id) where state < 10;
create index batch_by_campaign on batch (campaign_id, first_id);
create unique index batch_by_first on batch (first_id);
create index batch_by_bulk on batch (bulk_id) where bulk_id is not null;

-- One row per intent; what became of it is filled in by settle. Never deleted while its batch lives.
create table attempt (
  batch_id     bigint not null,
  n            int not null,
  campaign_id  bigint not null,
  first_id     bigint not null,
  last_id      bigint not null,
  replica_id   bigint not null,
  slot_at      timestamptz not null,
  intent_at    timestamptz not null default clock_timestamp(),
  ended_at     timestamptz,
  outcome      text,
  status       int,
  detail       text,
  refusal      text,
  pair         bigint,
  primary key (batch_id, n)
) with (fillfactor = 70);
create index attempt_by_campaign on attempt (campaign_id, first_id);

-- Written once by expansion, once by settle, once by its receipt. No index holds what the last two change.
create table message (
  campaign_id  bigint not null,
  id           bigint not null,
  phone        bigint,
  created_at   timestamptz not null default now(),
  settled_at   timestamptz,
  finished_at  timestamptz,
  segments     smallint not null default 0,
  state        smallint,
  text         text,
  reason       text,
  detail       text,
  provider_id  text,
  primary key (campaign_id, id)
) with (fillfactor = 70);
create unique index message_phone on message (campaign_id, phone) where campaign_id <> 0;
create sequence message_id as bigint;

-- Which message an id of Mitto's belongs to. Insert only.
create table provider_message (
  provider_id  text collate "C" not null primary key,
  campaign_id  bigint not null,
  message_id   bigint not null,
  account_id   int not null
);

-- Receipts whose id we do not know yet (they came before our own result), until they are matched.
create table early_receipt (
  id           bigint generated always as identity primary key,
  provider_id  text collate "C" not null,
  account_id   bigint,
  state        smallint not null,
  at           timestamptz,
  description  text,
  received_at  timestamptz not null default clock_timestamp()
);
create index early_receipt_by_provider on early_receipt (provider_id);

-- What came in as a receipt and could not be read: kept as it came.
create table raw_receipt (
  id           bigint generated always as identity primary key,
  account_id   bigint,
  body         text not null,
  why          text not null,
  received_at  timestamptz not null default clock_timestamp()
);

-- What settle and receipts decided, summed; a campaign's total is the sum over its shards and its batches.
create table campaign_counter (
  campaign_id      bigint not null,
  shard            smallint not null,
  pending          bigint not null default 0,
  delivered        bigint not null default 0,
  delivery_failed  bigint not null default 0,
  refused          bigint not null default 0,
  unknown          bigint not null default 0,
  skipped          bigint not null default 0,
  spent            bigint not null default 0,
  primary key (campaign_id, shard)
) with (fillfactor = 20);

create table idempotency (
  tenant_id   bigint not null,
  route       text not null,
  key         text not null,
  body_hash   bytea not null,
  status      int not null,
  answer      bytea not null,
  created_at  timestamptz not null default clock_timestamp(),
  primary key (tenant_id, route, key)
);
create index idempotency_by_age on idempotency (created_at);

-- Limiter state. Unlogged: after a crash it comes back empty, and an empty limiter is closed (see rate_open).
-- Scope 0: all accounts, 1: requests of an account, 2: its messages, 3: requests of a tenant, 4: its messages.
create unlogged table rate (
  scope         smallint not null,
  id            bigint not null,
  ts            bigint[] not null default '{}',
  cum           bigint[] not null default '{}',
  base          bigint not null default 0,
  last          bigint not null default 0,
  last_cost     int not null default 0,
  closed_until  bigint not null,
  v             float8 not null default 0,
  primary key (scope, id)
) with (fillfactor = 10, autovacuum_vacuum_cost_delay = 0);
alter table rate alter ts set storage plain, alter cum set storage plain;

-- A tenant's place in the fair order of its account, and of its own lanes in it. Unlogged: lost means equal again.
create unlogged table share (
  account_id  bigint not null,
  tenant_id   bigint not null,
  v           float8 not null default 0,
  lane_v      float8 not null default 0,
  primary key (account_id, tenant_id)
) with (fillfactor = 20, autovacuum_vacuum_cost_delay = 0);

-- The state that is shown: a message's own if it has one, else its batch's.
create view message_shown as
select m.campaign_id, m.id, m.phone, m.text, m.segments, m.reason, m.detail, m.provider_id,
       m.created_at, m.settled_at, m.finished_at, b.id as batch_id, b.tenant_id, b.bulk_id, b.reference,
       b.done_at as batch_done_at,
       case
         when m.state is null then
           case when b.state in (0, 1) then 'queued' when b.state in (2, 3) then 'processing'
                when b.state = 11 then 'unknown' when b.state = 12 then 'cancelled' end
         when m.state = 5 then 'unknown'
         when m.state in (10, 11) then 'accepted'
         when m.state = 20 then 'failed'
         when m.state = 30 then 'delivered'
         when m.state = 40 then 'failed'
         when m.state = 50 then 'skipped'
       end as status,
       m.state as own_state, b.state as batch_state
  from message m
  left join lateral (
    select * from batch where batch.first_id <= m.id order by batch.first_id desc limit 1
  ) b on b.last_id >= m.id and b.campaign_id = m.campaign_id;

-- A campaign's parts in one snapshot: what batches speak for and what messages say themselves.
create view campaign_totals as
select c.id as campaign_id, c.tenant_id,
       b.queued, b.processing, b.cancelled, b.batches,
       b.unknown + k.unknown as unknown,
       k.pending, k.delivered, k.delivery_failed, k.refused, k.skipped, k.spent
  from campaign c
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
