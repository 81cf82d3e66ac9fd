#!lua flags=allow-oom
-- UNRESERVE: free the slot if it has this nonce.
-- KEYS 1 slots  2 wait
-- ARGV 1 cid  2 nonce
-- ->   {entry, score} of the longest waiting start | {}
local held = redis.call('HGET', KEYS[1], ARGV[1])
if held and string.match(held, '^([^|]*)|') == ARGV[2] then redis.call('HDEL', KEYS[1], ARGV[1]) end
return redis.call('ZRANGE', KEYS[2], 0, 0, 'WITHSCORES')
