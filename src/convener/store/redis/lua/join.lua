#!lua
-- JOIN: become a member; the only step that makes one (core.membership.join).
-- KEYS 1 lease  2 dead  3 info  4 ver  5 pulse  6 grace  7 why
-- ARGV 1 sync channel  2 incarnation  3 ttl (ms)  4 renew interval (ms)  5 info (JSON)
-- ->   {'OK'|'DEAD', version}
-- @include now
-- @include membership
if redis.call('ZSCORE', KEYS[2], ARGV[2]) then return {'DEAD', version()} end
feel(tonumber(ARGV[3]))
redis.call('ZADD', KEYS[1], text(now + tonumber(ARGV[3])), ARGV[2])
redis.call('HSET', KEYS[3], ARGV[2], ARGV[3] .. '|' .. ARGV[4] .. '|' .. ARGV[5])
redis.call('SET', KEYS[5], text(now))
return {'OK', announce(ARGV[1])}
