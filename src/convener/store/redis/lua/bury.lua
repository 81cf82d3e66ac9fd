#!lua flags=allow-oom
-- BURY: the fast path for a killed process; compares everything itself (core.membership.bury).
-- KEYS 1 lease  2 dead  3 info  4 ver  5 pulse  6 grace  7 why
-- ARGV 1 sync channel  2 incarnation  3 its live channel  4 the caller's ttl (ms)  5 the caller
-- ->   'OK' | 'GONE' | 'GRACE' | 'FRESH' | 'ALIVE' | 'MANY'
-- @include now
-- @include membership
local function is_stale(name, deadline)
  local row = redis.call('HGET', KEYS[3], name)
  if not row then return false end
  local ttl, renew = terms(row)
  return now - (deadline - ttl) > 2 * renew + BURY_SLACK
end
local deadline = redis.call('ZSCORE', KEYS[1], ARGV[2])
if not deadline then return 'GONE' end
feel(tonumber(ARGV[4]))
if now < grace() then return 'GRACE' end
if not is_stale(ARGV[2], tonumber(deadline)) then return 'FRESH' end
if redis.call('PUBSUB', 'SHARDNUMSUB', ARGV[3])[2] > 0 then return 'ALIVE' end
local members, stale = redis.call('ZRANGE', KEYS[1], 0, -1, 'WITHSCORES'), 0
for i = 1, #members, 2 do
  if is_stale(members[i], tonumber(members[i + 1])) then stale = stale + 1 end
end
if stale > math.max(1, math.floor(#members / 2 / 3)) then return 'MANY' end
bury(ARGV[1], {ARGV[2]}, 'silent', ARGV[5])
return 'OK'
