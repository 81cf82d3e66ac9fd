#!lua flags=no-writes
-- DUE: what is due by the store's clock, longest overdue first.
-- KEYS 1 due
-- ARGV 1 limit
-- ->   {member, due, …}
-- @include now
return redis.call('ZRANGE', KEYS[1], '-inf', text(now), 'BYSCORE', 'LIMIT', 0, ARGV[1], 'WITHSCORES')
