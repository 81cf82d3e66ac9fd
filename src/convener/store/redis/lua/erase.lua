#!lua flags=allow-oom
-- ERASE: remove a stopped conversation, or one that was created and never started or written to
-- (core.conversation.erase).
-- KEYS 1 meta  2 log  3 in  4 seen  5 state  6 tail  7 asks  8 alarms
-- ->   'OK' | 'REFUSED'
local head = redis.call('HMGET', KEYS[1], 'owner', 'epoch', 'position', 'status')
if head[4] then
  local untouched = head[2] == '0' and head[3] == '0'
  if head[1] ~= '' or not (head[4] == 'stopped' or untouched) then return 'REFUSED' end
end
redis.call('UNLINK', unpack(KEYS))
return 'OK'
