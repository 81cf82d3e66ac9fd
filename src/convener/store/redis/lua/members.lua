#!lua flags=no-writes
-- MEMBERS: everybody, in one step.
-- KEYS 1 lease  2 dead  3 info  4 ver  5 pulse  6 grace  7 why
-- ->   {lease with deadlines, info (name, row), dead with times, version, pulse, grace, why (name, row)}
return {
  redis.call('ZRANGE', KEYS[1], 0, -1, 'WITHSCORES'),
  redis.call('HGETALL', KEYS[3]),
  redis.call('ZRANGE', KEYS[2], 0, -1, 'WITHSCORES'),
  redis.call('GET', KEYS[4]) or 0,
  redis.call('GET', KEYS[5]) or 0,
  redis.call('GET', KEYS[6]) or 0,
  redis.call('HGETALL', KEYS[7]),
}
