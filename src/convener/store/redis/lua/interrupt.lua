#!lua
-- INTERRUPT: record that the running turn is to end (core.intents.interrupt).
-- KEYS 1 meta  2 in
-- ARGV 1 channel  2 turn (JSON string)  3 the turn's position, 0 for whichever runs
-- ->   {'OK', position, owner, epoch} | {'IDLE'|'STALE'|'FULL'|'CLOSED'|'FAILED'|'HELD'|'NOT_FOUND'}
-- @include now
-- @include publish
-- @include refusal
-- @include inbox
local MAX_UNREAD = 1000
local head = redis.call('HMGET', KEYS[1], 'owner', 'epoch', 'cursor', 'position', 'done', 'status')
if not head[6] then return {'NOT_FOUND'} end
if head[6] ~= 'running' then return {refusal(head[6])} end
local last, done, wanted = tonumber(head[4]), tonumber(head[5]), tonumber(ARGV[3])
if last == done then return {'IDLE'} end
if ARGV[2] ~= '""' and wanted <= done then return {'STALE'} end
if last - tonumber(head[3]) >= MAX_UNREAD then return {'FULL'} end
local position, ts = text(last + 1), text(now)
local id = 'interrupt.' .. position
put_inbox(position, id, 'interrupt', '', ts, ARGV[2])
publish_inbox(ARGV[1], position, id, 'interrupt', '', ts, ARGV[2])
return {'OK', last + 1, head[1], head[2]}
