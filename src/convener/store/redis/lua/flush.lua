#!lua
-- FLUSH: changed records and clients of a node, and the version they are as of. Records are only replaced.
-- KEYS 1 conversations  2 connections
-- ARGV 1 version ('' to leave it)  2 number of records  3 number of joined clients  4… cid, record; then connection,
--      cid; then connections that left
-- ->   number of records replaced
local records, joined, replaced = tonumber(ARGV[2]), tonumber(ARGV[3]), 0
local at = 4
for _ = 1, records do
  if redis.call('HEXISTS', KEYS[1], ARGV[at]) == 1 then
    redis.call('HSET', KEYS[1], ARGV[at], ARGV[at + 1])
    replaced = replaced + 1
  end
  at = at + 2
end
for _ = 1, joined do
  redis.call('HSET', KEYS[2], ARGV[at], ARGV[at + 1])
  at = at + 2
end
for i = at, #ARGV do redis.call('HDEL', KEYS[2], ARGV[i]) end
if ARGV[1] ~= '' then redis.call('HSET', KEYS[1], '#version', ARGV[1]) end
return replaced
