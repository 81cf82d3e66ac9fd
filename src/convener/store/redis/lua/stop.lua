#!lua flags=allow-oom
-- STOP: record the intent; finish at once if nobody owns the conversation or its owner is buried
-- (core.conversation.stop). Unread messages and answers enter the log before the `stopped` entry gives them up.
-- KEYS 1 meta  2 log  3 in  4 tail  5 asks
-- ARGV 1 channel  2 me  3 reason (JSON string)  4 buried incarnation
-- ->   {'STOPPED'|'STOPPING'|'ALREADY', owner, nonce, user} as they were before | {'NOT_FOUND'}
-- @include now
-- @include head
-- @include tip
-- @include publish
-- @include events
local head = read_head()
if not head then return {'NOT_FOUND'} end
local function reply(outcome) return {outcome, head.owner, head.nonce, head.user} end
if head.status == 'stopped' then return reply('ALREADY') end
local ts = text(now)
if head.owner ~= '' and head.owner ~= ARGV[4] then
  if head.status == 'stopping' then return reply('STOPPING') end
  local position = text(tonumber(head.position) + 1)
  local id = 'stop.' .. position
  redis.call('XADD', KEYS[3], position .. '-0', 'id', id, 'kind', 'stop', 'user', '', 'ts', ts, 'data', ARGV[3])
  redis.call('HSET', KEYS[1], 'status', 'stopping', 'position', position, 'updated', ts)
  publish_inbox(ARGV[1], position, id, 'stop', '', ts, ARGV[3])
  return reply('STOPPING')
end

local tip_epoch, tip_seq = tip()
local epoch = text(next_epoch(tonumber(head.epoch), tip_epoch, 0))
local events = {open_event(ARGV[2], 'stop', tip_epoch, tip_seq)}
for _, entry in ipairs(redis.call('XRANGE', KEYS[3], '-', '+')) do events[#events + 1] = taken_in(entry) end
events[#events + 1] = '{"kind":"stopped","turn":"","ts":' .. ts .. ',"data":{"reason":' .. ARGV[3] .. '}}'
local seq = tonumber(head.seq)
for i, event in ipairs(events) do redis.call('XADD', KEYS[2], epoch .. '-' .. text(seq + i), 'e', event) end
redis.call('XTRIM', KEYS[3], 'MINID', text(tonumber(head.position) + 1) .. '-0')
redis.call('HSET', KEYS[1], 'owner', '', 'nonce', '', 'epoch', epoch, 'seq', text(seq + #events), 'batch', '', 'status',
  'stopped', 'cursor', head.position, 'done', head.position, 'asks', '0', 'updated', ts)
redis.call('UNLINK', KEYS[4], KEYS[5])
publish_log(ARGV[1], epoch, text(seq + 1), events, 1)
return reply('STOPPED')
