#!lua flags=allow-oom
-- RENEW: extend the lease; never makes a member (core.membership.renew).
-- KEYS 1 lease  2 dead  3 info  4 ver  5 pulse  6 grace  7 why
-- ARGV 1 incarnation  2 '1' if 3 is new information  3 info (JSON)  4 sync channel
-- ->   {'OK'|'DEAD', version}
-- @include now
-- @include membership
local row = redis.call('HGET', KEYS[3], ARGV[1])
if not row or not redis.call('ZSCORE', KEYS[1], ARGV[1]) then return {'DEAD', version()} end
local ttl, renew, said = terms(row)
feel(ttl)
redis.call('ZADD', KEYS[1], text(now + ttl), ARGV[1])
if ARGV[2] == '1' then
  redis.call('HSET', KEYS[3], ARGV[1], text(ttl) .. '|' .. text(renew) .. '|' .. ARGV[3])
end
redis.call('SET', KEYS[5], text(now))
if ARGV[2] == '1' and ARGV[3] ~= said then return {'OK', announce(ARGV[4])} end
return {'OK', version()}
