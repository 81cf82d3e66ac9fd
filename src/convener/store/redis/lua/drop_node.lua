#!lua flags=allow-oom
-- DROP_NODE: remove what is left of a buried node if it has no records.
-- KEYS 1 conversations  2 connections
-- ->   1 if nothing is left else 0
local records = redis.call('HLEN', KEYS[1]) - redis.call('HEXISTS', KEYS[1], '#version')
if records > 0 then return 0 end
redis.call('UNLINK', KEYS[1], KEYS[2])
return 1
