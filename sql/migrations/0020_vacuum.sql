-- oldest code: 3
-- A message's row is written some three times and then removed: at thousands of messages a second vacuum with its usual
-- pauses needs longer for a walk than these leave behind meanwhile, and the table grows. docs/performance.md has figures.
alter table message set (autovacuum_vacuum_cost_delay = 0, autovacuum_vacuum_scale_factor = 0.05);
