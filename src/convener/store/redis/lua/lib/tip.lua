-- (epoch, seq) of the last entry of the log in KEYS[2] as numbers, (0, 0) if there is none.
local function tip()
  if redis.call('EXISTS', KEYS[2]) == 0 then return 0, 0 end
  local info = redis.call('XINFO', 'STREAM', KEYS[2])
  for i = 1, #info, 2 do
    if info[i] == 'last-generated-id' then
      local epoch, seq = string.match(info[i + 1], '^(%d+)-(%d+)$')
      return tonumber(epoch), tonumber(seq)
    end
  end
  return 0, 0
end
-- An epoch above every earlier one (core.conversation.next_epoch).
local function next_epoch(epoch, tip_epoch, floor) return math.max(epoch + 1, tip_epoch + 1, now, floor + 1) end
local function open_event(node, reason, tip_epoch, tip_seq)
  return '{"kind":"open","turn":"","ts":' .. text(now) .. ',"data":{"node":"' .. node .. '","reason":"' .. reason
    .. '","prev":[' .. text(tip_epoch) .. ',' .. text(tip_seq) .. ']}}'
end
