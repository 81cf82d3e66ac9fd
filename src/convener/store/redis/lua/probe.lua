#!lua flags=allow-oom
-- PROBE: whether scripts may do here what the others do.
-- KEYS 1 ver
-- ARGV 1 a channel that nobody listens to
-- ->   1 if subscribers can be counted in a script else 0
redis.call('GET', KEYS[1])
local counted = redis.pcall('PUBSUB', 'SHARDNUMSUB', ARGV[1])
redis.call('SPUBLISH', ARGV[1], '')
return counted.err and 0 or 1
