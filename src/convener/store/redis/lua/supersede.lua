#!lua flags=allow-oom
-- SUPERSEDE: a node that was started again buries its former incarnation (core.membership.supersede).
-- KEYS 1 lease  2 dead  3 info  4 ver  5 pulse  6 grace  7 why
-- ARGV 1 sync channel  2 incarnation  3 the caller  4 the deadline that the caller has seen long enough ago (ms)
-- ->   'OK' | 'GONE' | 'FRESH' | 'OTHER'
-- @include now
-- @include membership
local deadline = redis.call('ZSCORE', KEYS[1], ARGV[2])
if not deadline then return 'GONE' end
local name = string.match(ARGV[2], '^(.*)~')
if ARGV[3] == ARGV[2] or name ~= string.match(ARGV[3], '^(.*)~') then return 'OTHER' end
if tonumber(deadline) ~= tonumber(ARGV[4]) then return 'FRESH' end
bury(ARGV[1], {ARGV[2]}, 'superseded', ARGV[3])
return 'OK'
