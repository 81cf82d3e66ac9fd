#!lua flags=allow-oom
-- EXPIRE: erase a conversation that nobody has used for long (core.retention.expire).
-- KEYS 1 meta  2 log  3 in  4 seen  5 state  6 tail  7 asks  8 alarms
-- ARGV 1 nothing may have happened since then, in ms
-- ->   'OK' | 'KEPT' | 'NOT_FOUND'
local head = redis.call('HMGET', KEYS[1], 'owner', 'updated', 'status', 'position', 'done')
if not head[3] then return 'NOT_FOUND' end
if head[1] ~= '' or tonumber(head[2]) > tonumber(ARGV[1]) or head[3] == 'stopping' then return 'KEPT' end
if head[3] == 'running' and (head[4] ~= head[5] or redis.call('EXISTS', KEYS[8]) == 1) then return 'KEPT' end
redis.call('UNLINK', unpack(KEYS))
return 'OK'
