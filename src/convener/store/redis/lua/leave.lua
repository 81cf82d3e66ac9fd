#!lua flags=allow-oom
-- LEAVE: a clean exit buries itself (core.membership.leave).
-- KEYS 1 lease  2 dead  3 info  4 ver  5 pulse  6 grace  7 why
-- ARGV 1 sync channel  2 incarnation
-- ->   1 if it was a member else 0
-- @include now
-- @include membership
if not redis.call('ZSCORE', KEYS[1], ARGV[2]) then return 0 end
bury(ARGV[1], {ARGV[2]}, 'left', ARGV[2])
return 1
