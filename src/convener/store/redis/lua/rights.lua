#!lua flags=allow-oom
-- RIGHTS: which commands the caller's user may not run. Tried on a key that is gone afterwards: nothing that a server
-- offers to scripts tells it without trying (ACL DRYRUN is the administrators').
-- KEYS 1 a key that nobody uses
-- ARGV 1 a channel that nobody listens to
-- ->   names of those that are refused
local key, refused = KEYS[1], {}
local function try(...)
  local reply = redis.pcall(...)
  local said = type(reply) == 'table' and reply.err
  if said and (string.find(said, 'to run the', 1, true) or string.find(said, "can't run this command", 1, true)) then
    refused[#refused + 1] = string.lower((...))
  end
end
try('DEL', key)
try('EXISTS', key)
try('TIME')
try('SET', key, '1')
try('INCR', key)
try('GET', key)
try('GETDEL', key)
try('HSET', key, 'f', 'v')
try('HGET', key, 'f')
try('HMGET', key, 'f')
try('HGETALL', key)
try('HKEYS', key)
try('HVALS', key)
try('HLEN', key)
try('HEXISTS', key, 'f')
try('HSCAN', key, '0')
try('HDEL', key, 'f')
try('ZADD', key, '1', 'm')
try('ZSCORE', key, 'm')
try('ZMSCORE', key, 'm')
try('ZCOUNT', key, '0', '1')
try('ZRANGE', key, '0', '0')
try('ZREVRANGE', key, '0', '0')
try('ZRANGEBYSCORE', key, '0', '1')
try('ZRANGEBYLEX', key, '-', '+')
try('ZREMRANGEBYSCORE', key, '2', '3')
try('ZREM', key, 'm')
try('XADD', key, '1-1', 'f', 'v')
try('XRANGE', key, '-', '+')
try('XREVRANGE', key, '+', '-')
try('XINFO', 'STREAM', key)
try('XTRIM', key, 'MINID', '1-1')
try('XDEL', key, '1-1')
try('UNLINK', key)
try('SPUBLISH', ARGV[1], '')
return refused
