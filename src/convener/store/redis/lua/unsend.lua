#!lua flags=allow-oom
-- UNSEND: take a message back that nobody has read, of a conversation that nobody owns (core.conversation.unsend).
-- KEYS 1 meta  2 in  3 seen
-- ARGV 1 message id  2 position
-- ->   'OK' | 'REFUSED'
local head = redis.call('HMGET', KEYS[1], 'owner', 'cursor', 'position', 'status')
if not head[4] or head[1] ~= '' then return 'REFUSED' end
local position, seen = tonumber(ARGV[2]), redis.call('ZSCORE', KEYS[3], ARGV[1])
if not seen or tonumber(seen) ~= position then return 'REFUSED' end
local found = redis.call('XRANGE', KEYS[2], ARGV[2] .. '-0', ARGV[2] .. '-0')[1]
local kind = found and found[2][4] -- as put_inbox has written it
if kind ~= 'message' and kind ~= 'interrupting' then return 'REFUSED' end
if position == tonumber(head[3]) then
  -- The number is given out again, and a stream never takes an id twice: write what is left into a new one.
  local rest = redis.call('XRANGE', KEYS[2], '-', '(' .. ARGV[2] .. '-0')
  redis.call('DEL', KEYS[2])
  for _, entry in ipairs(rest) do redis.call('XADD', KEYS[2], entry[1], unpack(entry[2])) end
  -- Not position - 1: what was below may have been taken back before, and nothing could ever settle it.
  local last = #rest > 0 and string.match(rest[#rest][1], '^%d+') or head[2]
  redis.call('HSET', KEYS[1], 'position', last)
else
  redis.call('XDEL', KEYS[2], ARGV[2] .. '-0')
end
redis.call('ZREM', KEYS[3], ARGV[1])
return 'OK'
