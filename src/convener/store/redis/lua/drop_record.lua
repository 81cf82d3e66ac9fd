#!lua flags=allow-oom
-- DROP_RECORD: remove the record if it has this nonce.
-- KEYS 1 conversations
-- ARGV 1 cid  2 nonce
-- ->   1 if removed else 0
local record = redis.call('HGET', KEYS[1], ARGV[1])
if not record or cjson.decode(record).nonce ~= ARGV[2] then return 0 end
return redis.call('HDEL', KEYS[1], ARGV[1])
